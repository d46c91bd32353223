"""`v4quant encode`: a conversation as the model reads it, text or token ids."""

from pathlib import Path
from typing import Annotated, Any

import typer

from v4quant.chat.texts import Encoder
from v4quant.cli._chat import Thinking, TokenizerSource, load_tokenizer, read_json
from v4quant.cli._options import JsonMode
from v4quant.cli._output import Output
from v4quant.errors import MessagesError


def encode(
    messages: Annotated[
        Path,
        typer.Argument(metavar="MESSAGES", help="JSON array of messages, as in OpenAI's chat API.", show_default=False),
    ],
    tokenizer: TokenizerSource = None,
    thinking: Thinking = False,
    effort: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="Reasoning effort: low, high or max. [says nothing]")
    ] = None,
    encoder: Annotated[
        Encoder, typer.Option(help="preview: V4-Flash and V4-Pro of April 2026. later: 0731 and 0813.")
    ] = Encoder.LATER,
    keep_reasoning: Annotated[
        bool, typer.Option("--keep-reasoning", help="Keep the reasoning of earlier turns, even without tools.")
    ] = False,
    json_mode: JsonMode = False,
) -> None:
    """Encode a conversation into V4's prompt: text, or with --tokenizer token ids that no message can forge.

    \b
    v4quant encode messages.json --thinking
    v4quant encode messages.json --thinking --effort max --tokenizer DeepSeek-V4-Flash
    """
    from v4quant.chat import EncodeOptions, read_messages
    from v4quant.chat import encode as render

    output = Output(json_mode)
    data = read_json(messages, "messages")
    try:
        options = EncodeOptions(thinking, effort, encoder, drop_reasoning=not keep_reasoning)
        prompt = render(read_messages(data), options)
    except MessagesError as error:
        raise MessagesError(f"{messages}: {error}", hint=error.hint) from None
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
