"""V4's prompts: messages to text or token ids, and completions to messages.

messages = read_messages(json)                      prompt = encode(messages, EncodeOptions(thinking=True))
encoded = Tokenizer(bytes, where).encode(prompt)    message = parse_completion(text, thinking=True)
answer = Answer(encoded, tokenizer)                 text = answer.add(token)     message = answer.message()
"""

from v4quant.chat.answer import Answer
from v4quant.chat.decode import Completion, parse_completion, parse_segments
from v4quant.chat.encode import EncodeOptions, encode
from v4quant.chat.messages import Message, Role, ToolCall, read_messages
from v4quant.chat.segments import Part, Prompt, Segment
from v4quant.chat.texts import Encoder
from v4quant.chat.tokenizer import EncodedPrompt, Span, Tokenizer

__all__ = [
    "Answer",
    "Completion",
    "EncodeOptions",
    "EncodedPrompt",
    "Encoder",
    "Message",
    "Part",
    "Prompt",
    "Role",
    "Segment",
    "Span",
    "Tokenizer",
    "ToolCall",
    "encode",
    "parse_completion",
    "parse_segments",
    "read_messages",
]
