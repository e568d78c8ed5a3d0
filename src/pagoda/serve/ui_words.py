"""The page's words in each of its languages; the keys are component names."""

LANGUAGES = {"en": "English", "zh": "中文"}

WORDS = {
    "en": {
        "new": "New conversation",
        "chats": "Conversations",
        "delete": "Delete this conversation",
        "language": "Language",
        "dark": "Light / dark",
        "chat": "Ask me something",
        "box": "Message (Enter sends, Esc stops)",
        "send": "Send",
        "stop": "Stop",
        "retry": "Retry",
        "reset": "Reset",
        "settings": "Settings",
        "system": "System prompt",
        "temperature": "Temperature",
        "top_p": "Top-p",
        "top_k": "Top-k (0: all)",
        "repetition_penalty": "Repetition penalty",
        "max_tokens": "Most new tokens",
        "speed": "{tokens} tokens · {rate:.1f} tokens/s · first token after {first:.0f} ms · "
        "{share:.0%} of the prompt from the cache",
    },
    "zh": {
        "new": "新对话",
        "chats": "对话列表",
        "delete": "删除此对话",
        "language": "语言",
        "dark": "浅色 / 深色",
        "chat": "请提问",
        "box": "输入消息（回车发送，Esc 停止）",
        "send": "发送",
        "stop": "停止",
        "retry": "重试",
        "reset": "重置",
        "settings": "设置",
        "system": "系统提示词",
        "temperature": "温度",
        "top_p": "Top-p",
        "top_k": "Top-k（0：不限）",
        "repetition_penalty": "重复惩罚",
        "max_tokens": "最多生成词元数",
        "speed": "{tokens} 个词元 · {rate:.1f} 词元/秒 · 首个词元 {first:.0f} 毫秒 · 提示中 {share:.0%} 来自缓存",
    },
}
