"""Chat formats by name, for models whose checkpoint has no template of its own. One record a format."""

from dataclasses import dataclass

TURNS = (
    "{{ bos_token if f.bos else '' }}"
    "{% if f.default_system and (not messages or messages[0].role != 'system') %}"
    "{{ f.system ~ f.default_system ~ f.end_system }}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ f.system ~ m.content ~ f.end_system }}"
    "{% elif m.role == 'user' %}{{ f.user ~ m.content ~ f.end_user }}"
    "{% elif m.role == 'assistant' %}{{ f.assistant ~ m.content ~ f.end_assistant }}"
    "{{ f.separator if not (loop.last and f.trim_last) else '' }}"
    "{% else %}{{ raise_exception('this template knows the roles system, user and assistant, not ' ~ m.role) }}"
    "{% endif %}{% endfor %}"
    "{{ f.assistant if add_generation_prompt else '' }}"
)
"""Formats that set marks around each turn."""

INSTRUCTIONS = (
    "{% set system = f.default_system %}{% set turns = messages %}"
    "{% if messages and messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}"
    "{% if m.role == 'user' %}{{ (bos_token if loop.first or f.bos_each else '') ~ f.user }}"
    "{{ f.system ~ system ~ f.end_system if loop.first and system else '' }}{{ m.content ~ f.end_user }}"
    "{% elif m.role == 'assistant' %}{{ f.assistant ~ m.content ~ f.end_assistant }}"
    "{% else %}{{ raise_exception('only user and assistant may follow the system message, not ' ~ m.role) }}"
    "{% endif %}{% endfor %}"
)
"""Formats that put the system prompt inside the first user turn (`[INST]`)."""


@dataclass(frozen=True)
class NamedTemplate:
    """Marks around the turns of one chat format. `source` is the Jinja text that reads them as `f`."""

    names: tuple[str, ...]
    system: str = ""
    end_system: str = ""
    user: str = ""
    end_user: str = ""
    assistant: str = ""
    end_assistant: str = ""
    separator: str = ""
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    bos: bool = True
    bos_each: bool = False
    trim_last: bool = False
    source: str = TURNS


INTERNLM_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文."
)
LLAMA2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ULTRA_SYSTEM = (
    "A one-turn chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, very detailed, and polite answers to the user's questions."
)


def _chatml(
    *names: str, default_system: str = "", stop_words: tuple[str, ...] = (), bos: bool = False
) -> NamedTemplate:
    return NamedTemplate(
        names,
        system="<|im_start|>system\n",
        end_system="<|im_end|>\n",
        user="<|im_start|>user\n",
        end_user="<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        end_assistant="<|im_end|>",
        separator="\n",
        default_system=default_system,
        stop_words=("<|im_end|>", *stop_words),
        bos=bos,
    )


def _llama3(*names: str, stop_words: tuple[str, ...] = ()) -> NamedTemplate:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return NamedTemplate(
        names,
        system=head.format("system"),
        end_system="<|eot_id|>",
        user=head.format("user"),
        end_user="<|eot_id|>",
        assistant=head.format("assistant"),
        end_assistant="<|eot_id|>",
        stop_words=("<|eot_id|>", "<|end_of_text|>", *stop_words),
    )


def _llama2(*names: str, default_system: str) -> NamedTemplate:
    return NamedTemplate(
        names,
        system="<<SYS>>\n",
        end_system="\n<</SYS>>\n\n",
        user="[INST] ",
        end_user=" [/INST]",
        assistant=" ",
        end_assistant=" </s>",
        default_system=default_system,
        stop_words=("</s>",),
        bos_each=True,
        source=INSTRUCTIONS,
    )


def _internlm1(*names: str) -> NamedTemplate:
    return NamedTemplate(
        names,
        system="<|System|>:",
        end_system="\n",
        user="<|User|>:",
        end_user="\n",
        assistant="<|Bot|>:",
        end_assistant="<eoa>",
        separator="\n",
        default_system=INTERNLM_SYSTEM,
        stop_words=("<eoa>",),
    )


TEMPLATES: tuple[NamedTemplate, ...] = (
    NamedTemplate(
        ("base", "llama", "internlm", "internlm-7b", "internlm-20b", "internlm2-7b", "internlm2-20b", "internlm2-1_8b",
         "baichuan-7b", "baichuan-base", "puyu", "falcon"),
        trim_last=True,
    ),
    _internlm1("internlm-chat-7b", "internlm-chat", "internlm-chat-20b", "internlm-chat-7b-8k", "internlm-chat-8k"),
    _chatml("internlm2-chat", "internlm2", "internlm2-chat-1_8b", "internlm2-chat-7b", "internlm2-chat-20b",
            default_system=INTERNLM_SYSTEM, stop_words=("<|action_end|>",), bos=True),
    _chatml("internlm2_5-chat", "internlm2_5", "internlm2_5-7b-chat", "internlm3", "internlm3-chat",
            default_system=INTERNLM_SYSTEM, stop_words=("<|action_end|>",), bos=True),
    _llama2("llama2", "llama-2", "llama-2-chat", "llama2-chat", default_system=LLAMA2_SYSTEM),
    _llama2("codellama", default_system=""),
    _llama3("llama3", "llama-3"),
    _llama3("llama3_1", "llama-3.1", "llama3_2", "llama-3.2", stop_words=("<|eom_id|>",)),
    _chatml("qwen", "qwen-7b", "qwen-14b", "qwen-chat", "qwen1_5", "qwen2",
            default_system="You are a helpful assistant.", stop_words=("<|endoftext|>",)),
    _chatml("qwen2_5", "qwen2.5", stop_words=("<|endoftext|>",),
            default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    _chatml("qwen3", stop_words=("<|endoftext|>",)),
    _chatml("chatml"),
    _chatml("yi", "yi-chat", "yi-34b", "yi-200k", stop_words=("<|endoftext|>",)),
    NamedTemplate(
        ("mistral", "mistral-instruct", "mixtral", "mixtral-instruct"), user="[INST] ", end_user=" [/INST]",
        end_system="\n\n", end_assistant="</s>", stop_words=("</s>",), source=INSTRUCTIONS,
    ),
    NamedTemplate(("baichuan", "baichuan-chat"), user="<reserved_102>", assistant="<reserved_103>", bos=False,
                  stop_words=("</s>", "<reserved_102>")),
    NamedTemplate(("baichuan2", "baichuan2-7b", "baichuan2-chat"), user="<reserved_106>", assistant="<reserved_107>",
                  bos=False, stop_words=("</s>", "<reserved_106>")),
    NamedTemplate(("vicuna", "wizardlm"), end_system="\n", user="USER: ", end_user="\n", assistant="ASSISTANT: ",
                  end_assistant="</s>", separator="\n", default_system=VICUNA_SYSTEM, stop_words=("</s>",)),
    NamedTemplate(("gemma", "gemma2"), system="<start_of_turn>user\n", end_system="<end_of_turn>\n",
                  user="<start_of_turn>user\n", end_user="<end_of_turn>\n", assistant="<start_of_turn>model\n",
                  end_assistant="<end_of_turn>\n", stop_words=("<end_of_turn>",)),
    NamedTemplate(("phi-3", "phi3", "phi-3.5"), system="<|system|>\n", end_system="<|end|>\n", user="<|user|>\n",
                  end_user="<|end|>\n", assistant="<|assistant|>\n", end_assistant="<|end|>", separator="\n", bos=False,
                  stop_words=("<|end|>", "<|endoftext|>")),
    NamedTemplate(("solar", "solar-70b"), system="### System:\n", end_system="\n\n", user="### User:\n",
                  end_user="\n\n", assistant="### Assistant:\n", end_assistant="\n\n", stop_words=("### User:",)),
    NamedTemplate(("ultralm", "ultracm"), system="User: ", end_system="</s>\n", user="User: ", end_user="</s>\n",
                  assistant="Assistant: ", end_assistant="</s>", separator="\n", default_system=ULTRA_SYSTEM,
                  stop_words=("</s>",)),
)  # fmt: skip


def by_name(templates: tuple[NamedTemplate, ...] = TEMPLATES) -> dict[str, NamedTemplate]:
    """Every name and alias -> its record; a name given to two records is our mistake."""
    table = {name: t for t in templates for name in t.names}
    assert len(table) == sum(len(t.names) for t in templates)
    return table


NAMED = by_name()
