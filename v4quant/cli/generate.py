"""`v4quant generate`: what a model answers to a conversation, as a sanity check for people."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v4quant.chat.texts import Encoder
from v4quant.chat.tokens import EOS, IDS
from v4quant.cli._chat import (
    TOKENIZER_NAME,
    Effort,
    EncoderChoice,
    KeepReasoning,
    Messages,
    Thinking,
    load_tokenizer,
    read_prompt,
)
from v4quant.cli._options import JsonMode, Source
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.cli._progress import layer_progress
from v4quant.errors import CheckpointError, CompletionError, InterruptedRunError, MessagesError

if TYPE_CHECKING:
    from v4quant.chat import Answer, Completion, Tokenizer
    from v4quant.checkpoint.reader import Checkpoint
    from v4quant.model.generation import Step
    from v4quant.model.transformer import Transformer


@dataclass
class _Run:
    """How a generation went.

    Attributes:
        finish: "stop" at the end of the sentence, "length" at the limit, "interrupted" by the user.
        prefill_seconds, seconds: to the first token, and to the last one.
    """

    finish: str = "length"
    prefill_seconds: float = 0.0
    seconds: float = 0.0

    def tokens_per_second(self, tokens: int) -> float | None:
        """Speed of the decode steps; None where there was none."""
        steps = self.seconds - self.prefill_seconds
        return (tokens - 1) / steps if tokens > 1 and steps > 0 else None


def generate(
    src: Source,
    messages: Messages,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens at most.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the best token, above it draws.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Draw from the fewest tokens that hold this share, at most 1.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S", help="The same seed draws the same text.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="SRC", help="Folder of the tokenizer, or its tokenizer.json. [SRC itself]")
    ] = None,
    thinking: Thinking = False,
    effort: Effort = None,
    encoder: EncoderChoice = Encoder.LATER,
    keep_reasoning: KeepReasoning = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_mode: JsonMode = False,
) -> None:
    """Answer a conversation with the whole model in memory: text as it comes, then the tool calls in it.

    \b
    v4quant generate small-v4 messages.json
    v4quant generate small-v4 messages.json --thinking --temperature 1 --top-p 0.95 --seed 7
    """
    # torch loads here, so that `v4quant --help` need not wait for it.
    from v4quant.chat import Answer, EncodeOptions
    from v4quant.checkpoint.reader import open_checkpoint
    from v4quant.model.generation import generate as steps_of
    from v4quant.model.generation import prompt_of
    from v4quant.model.sampling import Sampling

    output = Output(json_mode)
    sampling = Sampling(temperature, top_p, seed)
    options = EncodeOptions(thinking, effort, encoder, drop_reasoning=not keep_reasoning)
    checkpoint = open_checkpoint(src)
    known = _tokenizer_of(checkpoint, src, tokenizer)
    encoded = known.encode(read_prompt(messages, options))
    try:
        answer = Answer(encoded, known)
    except MessagesError as error:
        raise MessagesError(f"{messages}: {error}", hint=error.hint) from None
    prompt = prompt_of(encoded.ids, checkpoint.config, str(messages))
    start = time.monotonic()
    model = _load(checkpoint, device, len(prompt) + max_tokens, output)
    load_seconds = time.monotonic() - start
    run = _stream(output, answer, steps_of(model, prompt, sampling, max_tokens, IDS[EOS]))
    message, problem = _message(answer)
    output.result(
        {
            "text": answer.text.removesuffix(EOS),
            "ids": answer.ids,
            "message": message.to_json() if message else None,
            "message_error": problem,
            "finish_reason": run.finish,
            "prompt_tokens": len(prompt),
            "tokens": len(answer.ids),
            "seconds": run.seconds,
            "prefill_seconds": run.prefill_seconds,
            "load_seconds": load_seconds,
            "tokens_per_second": run.tokens_per_second(len(answer.ids)),
        }
    )
    _say_what_came(output, answer, run, len(prompt), message, problem)
    if run.finish == "interrupted":
        raise InterruptedRunError(f"interrupted after {plural(len(answer.ids), 'token')}")


def _tokenizer_of(checkpoint: "Checkpoint", src: Path, other: Path | None) -> "Tokenizer":
    """The checkpoint's own tokenizer, or another one that the user names.

    Raises:
        CheckpointError: if there is none, or it gives ids that the model does not have.
    """
    if other is None and TOKENIZER_NAME not in checkpoint.files:
        raise CheckpointError(
            f"{src}: has no {TOKENIZER_NAME}, which text needs",
            hint="Copy it from the release, or name one that is elsewhere: --tokenizer SRC",
        )
    tokenizer = load_tokenizer(other or src)
    if tokenizer.size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{tokenizer.where}: gives ids up to {tokenizer.size - 1:,}, expected less than vocab_size "
            f"{checkpoint.config.vocab_size:,} of {src}/config.json: it is another model's",
            hint="For a synthetic checkpoint: v4quant synth OUT --like flash --tiny --vocab full",
        )
    return tokenizer


def _load(checkpoint: "Checkpoint", device: str, tokens: int, output: Output) -> "Transformer":
    """Read the whole model, if it fits."""
    from v4quant.model.arithmetic import Arithmetic, Products
    from v4quant.model.device import device_named
    from v4quant.model.resident import describe, free_bytes, needs_of, require_fits
    from v4quant.model.transformer import Transformer

    place = device_named(device)
    arithmetic = Arithmetic(products=Products.DECODED if place.type == "cpu" else Products.CODED)
    needs, free = needs_of(checkpoint, arithmetic, tokens), free_bytes(place)
    require_fits(needs, free, checkpoint.where)
    output.note(f"memory: {describe(needs)}; free: {'not known' if free is None else decimal_bytes(free)}")
    with layer_progress(checkpoint.config.num_hidden_layers, "load") as done:
        return Transformer(checkpoint, arithmetic, place, progress=done)


def _stream(output: Output, answer: "Answer", steps: "Iterator[Step]") -> _Run:
    """Print text as it comes; Ctrl-C ends it, and what came so far is kept."""
    run, start = _Run(), time.monotonic()
    try:
        for step in steps:
            run.seconds = time.monotonic() - start
            run.prefill_seconds = run.prefill_seconds or run.seconds
            output.piece(answer.add(step.token).removesuffix(EOS))
            if step.token == IDS[EOS]:
                run.finish = "stop"
    except KeyboardInterrupt:
        run.finish, run.seconds = "interrupted", time.monotonic() - start
    output.line(answer.rest())
    return run


def _message(answer: "Answer") -> "tuple[Completion | None, str | None]":
    """The message, or why there is none."""
    try:
        return answer.message(), None
    except CompletionError as error:
        return None, str(error)


def _say_what_came(
    output: Output, answer: "Answer", run: _Run, prompt: int, message: "Completion | None", problem: str | None
) -> None:
    for call in message.tool_calls if message else ():
        output.line(f"call: {call.name} {call.arguments}")
    if problem is not None:
        output.note(f"no message: {problem}")
    speed = run.tokens_per_second(len(answer.ids))
    output.note(
        f"{plural(prompt, 'token')} read in {run.prefill_seconds:.1f} s, {plural(len(answer.ids), 'token')} written in "
        f"{run.seconds - run.prefill_seconds:.1f} s{f', {speed:.2f} a second' if speed else ''}; ended by: {run.finish}"
    )
