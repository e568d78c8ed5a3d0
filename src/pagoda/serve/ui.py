"""The web page: a Gradio front of a server, which it knows only over HTTP. Conversations live in the browser."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from pagoda.errors import PagodaError
from pagoda.serve.client import Client, Piece
from pagoda.toml_data import read_table

LANGUAGES = {"en": "English", "zh": "中文"}
WORDS = read_table("serve", "ui_words")
MAX_CHATS = 50
REDRAW_SECONDS = 0.05
DARK = "() => { document.body.classList.toggle('dark') }"

Messages = list[dict[str, Any]]


def text_of(message: dict[str, Any]) -> str:
    """A message's text, in any of the forms that Gradio hands out."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    return "".join(p.get("text", "") if isinstance(p, dict) else str(p or "") for p in parts)


def plain(history: Messages | None) -> Messages:
    return [{"role": m["role"], "content": text_of(m)} for m in history or []]


def speed_line(words: dict[str, str], piece: Piece, started: float, first: float | None) -> str:
    """Tokens per second, time to the first one, and the share of the prompt that came from the cache."""
    if first is None or not piece.tokens:
        return ""
    now = time.monotonic()
    rate = (piece.tokens - 1) / (now - first) if now > first else 0.0
    share = piece.cached_tokens / max(1, piece.prompt_tokens)
    return words["speed"].format(tokens=piece.tokens, rate=rate, first=1000 * (first - started), share=share)


class Page:
    """What the page does; `build` lays it out. Every running reply has a flag by which Stop ends it."""

    def __init__(self, client: Client):
        self.client = client
        self.model = client.model()
        self._stops: dict[str, threading.Event] = {}

    # ---- the conversation --------------------------------------------------------------------------------------

    def ask(self, text: str, history: Messages | None) -> tuple[str, Messages]:
        """The user's message goes into the history and out of the box."""
        said = [{"role": "user", "content": text.strip()}] if text.strip() else []
        return "", plain(history) + said

    def answer(
        self, history: Messages | None, store: dict[str, Any], reply_id: str, system: str, *sliders: float
    ) -> Iterator[tuple[Messages, str]]:
        """Stream a reply to the history's last message; stops when the flag of `reply_id` is set."""
        said, words = plain(history), WORDS[store["language"]]
        if not said or said[-1]["role"] != "user":
            yield said, ""
            return
        stop = self._stops.setdefault(reply_id, threading.Event())
        asked = [{"role": "system", "content": system.strip()}] if system.strip() else []
        fields = dict(zip(("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens"), sliders))
        fields |= {"top_k": int(fields["top_k"]), "max_tokens": int(fields["max_tokens"])}
        started, first, shown, text, line = time.monotonic(), None, 0.0, "", ""
        pieces = self.client.chat(asked + said, **fields)
        try:
            for piece in pieces:
                text += piece.reasoning + piece.text
                now = time.monotonic()
                first = first or (now if piece.tokens else None)
                line = speed_line(words, piece, started, first)
                if stop.is_set():
                    break
                if now - shown > REDRAW_SECONDS:
                    shown = now
                    yield [*said, {"role": "assistant", "content": text}], line
        except PagodaError as error:
            gr.Warning(str(error))
        finally:
            pieces.close()  # type: ignore[attr-defined]
            self._stops.pop(reply_id, None)
        yield ([*said, {"role": "assistant", "content": text}] if text else said), line

    def stop(self, reply_id: str) -> None:
        """End the page's running reply; what came stays."""
        flag = self._stops.get(reply_id)
        if flag is not None:
            flag.set()

    def again(self, history: Messages | None) -> Messages:
        """The history without its last reply."""
        said = plain(history)
        while said and said[-1]["role"] == "assistant":
            said.pop()
        return said

    def edited(self, history: Messages | None, event: gr.EditData) -> Messages:
        """The history up to a message of the user, with its new text."""
        said = plain(history)
        if said[event.index]["role"] != "user":
            return said
        return [*said[: event.index], {"role": "user", "content": str(event.value)}]

    # ---- the list of conversations -----------------------------------------------------------------------------

    def saved(self, store: dict[str, Any], history: Messages | None, system: str) -> tuple[dict[str, Any], Any]:
        """The browser's store with the shown conversation in it, and the list."""
        said = plain(history)
        others = [c for c in store["chats"] if c["id"] != store["current"]]
        if said:
            title = said[0]["content"].strip().replace("\n", " ")[:40] or "…"
            others = [{"id": store["current"], "title": title, "messages": said, "system": system}, *others]
        store = {**store, "chats": others[:MAX_CHATS]}
        return store, self.listed(store)

    def listed(self, store: dict[str, Any]) -> Any:
        ids = [c["id"] for c in store["chats"]]
        choices = [(c["title"], c["id"]) for c in store["chats"]]
        return gr.update(choices=choices, value=store["current"] if store["current"] in ids else None)

    def fresh(self, store: dict[str, Any]) -> tuple[dict[str, Any], Any, Messages, str]:
        store = {**store, "current": uuid.uuid4().hex}
        return store, self.listed(store), [], ""

    def forget(self, store: dict[str, Any]) -> tuple[dict[str, Any], Any, Messages, str]:
        chats = [c for c in store["chats"] if c["id"] != store["current"]]
        return self.fresh({**store, "chats": chats})

    def show(self, store: dict[str, Any], chosen: str | None) -> tuple[dict[str, Any], Messages, str, str]:
        chat = next((c for c in store["chats"] if c["id"] == chosen), None)
        if chat is None:
            return store, [], "", ""
        return {**store, "current": chat["id"]}, chat["messages"], chat["system"], ""

    def opened(self, store: dict[str, Any] | None, request: gr.Request) -> list[Any]:
        """The page as the browser left it; its language is the store's, else the browser's."""
        store = store or {}
        if "chats" not in store:
            chinese = request.headers.get("accept-language", "").lower().startswith("zh")
            store = {"language": "zh" if chinese else "en", "current": uuid.uuid4().hex, "chats": []}
        store, messages, system, _ = self.show(store, store["current"])
        return [store, self.listed(store), messages, system, store["language"], uuid.uuid4().hex]

    # ---- the layout --------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        """The page. Component names are keys of `WORDS`."""
        limit = int(self.model.get("max_model_len") or 4096)
        with gr.Blocks(title=f"Pagoda · {self.model['id']}", analytics_enabled=False, fill_height=True) as page:
            c: dict[str, Any] = {"store": gr.BrowserState({}, storage_key="pagoda", secret="pagoda")}
            c["reply_id"] = gr.State("")
            with gr.Sidebar(width=260, open=False):
                c["new"] = gr.Button(variant="primary", size="sm", elem_id="new")
                c["chats"] = gr.Radio([], elem_id="chats")
                c["delete"] = gr.Button(size="sm", elem_id="delete")
                c["language"] = gr.Radio([(name, code) for code, name in LANGUAGES.items()], elem_id="language")
                c["dark"] = gr.Button(size="sm", elem_id="dark")
            gr.Markdown(f"### {self.model['id']}")
            c["chat"] = gr.Chatbot(elem_id="chat", editable="user", buttons=["copy"], show_label=False)
            c["speed"] = gr.Markdown("", elem_id="speed")
            c["box"] = gr.Textbox(lines=1, max_lines=8, autofocus=True, show_label=False, elem_id="box")
            with gr.Row(elem_id="bar"):
                c["send"] = gr.Button(variant="primary", elem_id="send")
                c["stop"] = gr.Button(variant="stop", elem_id="stop")
                c["retry"] = gr.Button(elem_id="retry")
                c["reset"] = gr.Button(elem_id="reset")
            with gr.Accordion(open=False) as c["settings"]:
                c["system"] = gr.Textbox(lines=2, elem_id="system")
                c["temperature"] = gr.Slider(0, 2, 0.7, step=0.05)
                c["top_p"] = gr.Slider(0.05, 1, 0.9, step=0.05)
                c["top_k"] = gr.Slider(0, 200, 40, step=1)
                c["repetition_penalty"] = gr.Slider(0.8, 2, 1.0, step=0.05)
                c["max_tokens"] = gr.Slider(1, limit, min(512, limit), step=1)
            self._wire(page, c)
        return page

    def _wire(self, page: gr.Blocks, c: dict[str, Any]) -> None:
        store, chat, chats, system, speed = c["store"], c["chat"], c["chats"], c["system"], c["speed"]
        sliders = [c[n] for n in ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")]

        def then_answer(event: Any) -> None:
            event.then(
                self.answer, [chat, store, c["reply_id"], system, *sliders], [chat, speed], show_progress="hidden"
            ).then(self.saved, [store, chat, system], [store, chats], show_progress="hidden")

        def quiet(trigger: Callable[..., Any], work: Any, inputs: Any, outputs: Any) -> Any:
            return trigger(work, inputs, outputs, show_progress="hidden")

        for trigger in (c["box"].submit, c["send"].click):
            then_answer(quiet(trigger, self.ask, [c["box"], chat], [c["box"], chat]))
        for trigger in (c["retry"].click, chat.retry):
            then_answer(quiet(trigger, self.again, [chat], [chat]))
        then_answer(quiet(chat.edit, self.edited, [chat], [chat]))
        c["stop"].click(self.stop, [c["reply_id"]], None, queue=False, show_progress="hidden")
        shown = [store, chats, chat, speed]
        for trigger, work in ((c["new"].click, self.fresh), (c["delete"].click, self.forget)):
            trigger(self.stop, [c["reply_id"]], None, queue=False).then(work, [store], shown, show_progress="hidden")
        for trigger in (c["reset"].click, chat.clear):
            quiet(trigger, lambda: ([], ""), None, [chat, speed]).then(
                self.saved, [store, chat, system], [store, chats], show_progress="hidden"
            )
        quiet(chats.input, self.show, [store, chats], [store, chat, system, speed])
        c["dark"].click(None, js=DARK)
        worded = [c[name] for name in WORDS["en"] if name in c and name != "speed"]
        quiet(c["language"].change, self._worded(c), [c["language"], store], [store, *worded])
        opened = [store, chats, chat, system, c["language"], c["reply_id"]]
        page.load(self.opened, [store], opened, show_progress="hidden")

    def _worded(self, c: dict[str, Any]) -> Callable[[str, dict[str, Any]], list[Any]]:
        """Put the labels into a language: a button's value, a box's placeholder, any other label."""
        names = [name for name in WORDS["en"] if name in c and name != "speed"]

        def words(language: str, store: dict[str, Any]) -> list[Any]:
            out: list[Any] = [{**store, "language": language}]
            for name in names:
                word = WORDS[language][name]
                if isinstance(c[name], gr.Button):
                    out.append(gr.update(value=word))
                else:
                    out.append(gr.update(**({"placeholder": word} if name in ("box", "chat") else {"label": word})))
            return out

        return words


def launch(client: Client, server_name: str, server_port: int, block: bool = True) -> Any:
    """Serve the page, on this machine's own address only unless told otherwise, and never through a tunnel."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "sans-serif"]
    theme = gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "Consolas", "monospace"])
    page = Page(client).build().queue(max_size=256, default_concurrency_limit=64)
    return page.launch(
        server_name=server_name,
        server_port=server_port or None,
        share=False,
        quiet=True,
        ssr_mode=False,
        theme=theme,
        css=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        js=Path(__file__).with_name("page.js").read_text(encoding="utf-8"),
        footer_links=[],
        prevent_thread_lock=not block,
    )
