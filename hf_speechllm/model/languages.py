"""Names of languages in the prompts of Fun-ASR."""

from __future__ import annotations

# ISO 639 code -> language name in Fun-ASR's prompts.
LANGUAGES = {
    "zh": "中文", "en": "英文", "ja": "日文", "yue": "粤语", "ko": "韩文", "vi": "越南语", "id": "印尼语",
    "th": "泰语", "ms": "马来语", "tl": "菲律宾语", "ar": "阿拉伯语", "hi": "印地语", "bg": "保加利亚语",
    "hr": "克罗地亚语", "cs": "捷克语", "da": "丹麦语", "nl": "荷兰语", "et": "爱沙尼亚语", "fi": "芬兰语",
    "el": "希腊语", "hu": "匈牙利语", "ga": "爱尔兰语", "lv": "拉脱维亚语", "lt": "立陶宛语",
    "mt": "马耳他语", "pl": "波兰语", "pt": "葡萄牙语", "ro": "罗马尼亚语", "sk": "斯洛伐克语",
    "sl": "斯洛文尼亚语", "sv": "瑞典语",
}  # fmt: skip
# English name in lower case -> ISO 639 code; also of languages without a name in Fun-ASR's prompts.
ENGLISH_NAMES = {
    "chinese": "zh", "mandarin": "zh", "cmn": "zh", "english": "en", "cantonese": "yue", "japanese": "ja",
    "korean": "ko", "vietnamese": "vi", "indonesian": "id", "thai": "th", "malay": "ms", "filipino": "tl",
    "arabic": "ar", "hindi": "hi", "german": "de", "french": "fr", "spanish": "es", "portuguese": "pt",
    "italian": "it", "russian": "ru", "turkish": "tr", "dutch": "nl", "swedish": "sv", "danish": "da",
    "finnish": "fi", "polish": "pl", "czech": "cs", "persian": "fa", "greek": "el", "romanian": "ro",
    "hungarian": "hu", "bulgarian": "bg", "croatian": "hr", "estonian": "et", "irish": "ga", "latvian": "lv",
    "lithuanian": "lt", "maltese": "mt", "slovak": "sk", "slovenian": "sl",
}  # fmt: skip


def language_name(language: str) -> str:
    """Returns the name of a language in the prompts. A name that is not ASCII (any Chinese name) is kept unchanged.

    Args:
        language: ISO 639 code from `LANGUAGES`, the English or the Chinese name.

    Raises:
        ValueError: if the language is neither a known code or English name nor a Chinese name.
    """
    code = language.lower()
    name = LANGUAGES.get(ENGLISH_NAMES.get(code, code), language)
    if not name or name.isascii():
        raise ValueError(
            f"unknown language {language!r}; give the Chinese name, or one of: "
            f"{', '.join(f'{k} ({v})' for k, v in LANGUAGES.items())}"
        )
    return name
