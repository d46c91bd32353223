"""The fixed texts of V4's prompts, byte for byte as the model was trained on them.

Source: the encoders that the releases ship; tests compare their hashes.
"""

from collections.abc import Mapping
from enum import StrEnum

from v4quant.chat.tokens import DSML, END_THINK, THINK

_CALLS = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
_END_INVOKE, _END_PARAMETER = f"</{DSML}invoke>", f"</{DSML}parameter>"

TOOLS_HEAD = (
    "## Tools\n\n"
    "You have access to a set of tools to help answer the user's question. "
    f'You can invoke tools by writing a "{_CALLS[0]}" block like the following:\n\n'
    f"{_CALLS[0]}\n"
    f'<{DSML}invoke name="$TOOL_NAME">\n'
    f'<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{_END_PARAMETER}\n'
    "...\n"
    f"{_END_INVOKE}\n"
    f'<{DSML}invoke name="$TOOL_NAME2">\n'
    "...\n"
    f"{_END_INVOKE}\n"
    f"{_CALLS[1]}\n\n"
    'String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, '
    'arrays, objects), pass the value in JSON format and set `string="false"`.\n\n'
    f"If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside "
    f"{THINK}...{END_THINK} BEFORE any tool calls or final response.\n\n"
    f"Otherwise, output directly after {END_THINK} with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n"
)
TOOLS_TAIL = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
RESPONSE_FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

_ABSOLUTE_MAXIMUM = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND_MAXIMUM = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying "
    "cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)


class Encoder(StrEnum):
    """The two encoders that were released; they differ in what a reasoning effort says.

    PREVIEW: V4-Flash and V4-Pro of April 2026. LATER: V4-Flash-0731 and V4-Pro-0813.
    """

    PREVIEW = "preview"
    LATER = "later"


# Effort -> the text after BOS, in thinking mode. Without any effort nothing is said.
EFFORT_TEXTS: Mapping[Encoder, Mapping[str, str]] = {
    Encoder.PREVIEW: {"high": "", "max": _ABSOLUTE_MAXIMUM},
    Encoder.LATER: {"low": "", "high": _ABSOLUTE_MAXIMUM, "max": _BEYOND_MAXIMUM},
}
# As DeepSeek's own request conversion reads the words of other APIs.
EFFORT_ALIASES: Mapping[Encoder, Mapping[str, str]] = {
    Encoder.PREVIEW: {},
    Encoder.LATER: {"minimal": "low", "medium": "high", "xhigh": "high"},
}
