"""`v4quant encode`: a conversation as the model reads it, text or token ids."""

from typing import Any

from v4quant.chat.texts import Encoder
from v4quant.cli._chat import (
    Effort,
    EncoderChoice,
    KeepReasoning,
    Messages,
    Thinking,
    TokenizerSource,
    load_tokenizer,
    read_prompt,
)
from v4quant.cli._options import JsonMode
from v4quant.cli._output import Output


def encode(
    messages: Messages,
    tokenizer: TokenizerSource = None,
    thinking: Thinking = False,
    effort: Effort = None,
    encoder: EncoderChoice = Encoder.LATER,
    keep_reasoning: KeepReasoning = False,
    json_mode: JsonMode = False,
) -> None:
    """Encode a conversation into V4's prompt: text, or with --tokenizer token ids that no message can forge.

    \b
    v4quant encode messages.json --thinking
    v4quant encode messages.json --thinking --effort max --tokenizer DeepSeek-V4-Flash
    """
    from v4quant.chat import EncodeOptions

    output = Output(json_mode)
    prompt = read_prompt(messages, EncodeOptions(thinking, effort, encoder, drop_reasoning=not keep_reasoning))
    result: dict[str, Any] = {
        "text": prompt.text,
        "control_ranges": prompt.control_ranges,
        "spelled_tokens": [{"message": message, "token": token} for message, token in prompt.spelled_tokens],
    }
    if tokenizer is not None:
        encoded = load_tokenizer(tokenizer).encode(prompt)
        result |= {
            "ids": encoded.ids,
            "spans": [
                {"start": span.start, "stop": span.stop, "part": str(span.part), "message": span.message}
                for span in encoded.spans
            ],
        }
    output.result(result)
    output.line(prompt.text if tokenizer is None else str(result["ids"]))
    if prompt.spelled_tokens and tokenizer is None:
        message, token = prompt.spelled_tokens[0]
        output.note(
            f"messages[{message}] spells {token}, which in this text looks like the real token; "
            "ids keep them apart: --tokenizer"
        )
