"""Text in, text out: tokenizers, chat templates, streams, tool calls, reasoning, grammars. Imports no torch."""
