"""The special tokens of V4's prompts: spelling and id, the same in every V4 release.

The bar is U+FF5C and the low line U+2581. The DSML token has no angle brackets of its own: `<｜DSML｜invoke` is the
text `<`, the token, then text. Source: tokenizer.json of the releases.
"""

from collections.abc import Mapping

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"

# Quick instructions: the name in `task` -> the token that asks for it.
TASKS: Mapping[str, str] = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
IDS: Mapping[str, int] = {
    BOS: 0,
    EOS: 1,
    USER: 128_803,
    ASSISTANT: 128_804,
    THINK: 128_821,
    END_THINK: 128_822,
    DSML: 128_825,
    LATEST_REMINDER: 128_828,
    TASKS["action"]: 128_829,
    TASKS["query"]: 128_830,
    TASKS["authority"]: 128_831,
    TASKS["domain"]: 128_832,
    TASKS["title"]: 128_836,
    TASKS["read_url"]: 128_845,
}
