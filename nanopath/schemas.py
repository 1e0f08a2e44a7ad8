"""
What a client of api.py may send, as pydantic models: OpenAI's fields, the defaults and the limits of each.

    ChatRequest, CompletionRequest, EmbeddingRequest    the bodies; anything else is refused by name
    split_input, plain_message, call_schema             what the tokenizer, a chat template and a grammar need of them
    CallFilter                                          the tool calls in what a model writes

Reads   OpenAI's API reference: chat completions, completions, embeddings
"""
import json
import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanopath.limits import ApiError

CALL, CALL_END = "<tool_call>", "</tool_call>"                     # how Qwen, Hermes and SmolLM write a call


class Strict(BaseModel):
    """No conversions ("5" is no number), no unknown fields, and null means that a field is not given."""
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data):
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False                              # accepted, without effect


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None                      # name, strict, schema


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    name: str
    arguments: str                                                 # JSON


class ToolCall(Strict):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool = False


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class Sampling(Strict):
    """What both ways to write a text share. The last five are not OpenAI's; top_k 0, min_p 0 and repetition_penalty 1
    are off."""
    model: str = ""                                                # empty: the base model
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: str | list[str] = []
    seed: Annotated[int, Field(ge=-2 ** 63, lt=2 ** 63)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, float] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: Any = None                                               # this and the next five have no effect here
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True                               # False: only the first call is kept
    chat_template_kwargs: dict[str, Any] = {}                      # such as {"enable_thinking": false}

    @property
    def alternatives(self):
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None

    @property
    def alternatives(self):
        return self.logprobs


class EmbeddingRequest(Strict):
    model: str = ""
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Any = None


def split_input(value, param):
    """A prompt in any of its four forms -> a list of texts or lists of ids."""
    values = [value] if isinstance(value, str) or value and isinstance(value[0], int) else value
    if not values:
        raise ApiError(400, f"{param} is an empty list", param)
    return values


class CallFilter:
    """Splits a text into words for the reader and, from the first <tool_call> on, calls. begun: the prompt has already
    opened a call."""
    def __init__(self, active, begun):
        self.active, self.calls = active, CALL if begun else ""
        self.held = ""

    def push(self, text):
        if not self.active:
            return text
        if self.calls:
            self.calls += text
            return ""
        text = self.held + text
        words, mark, rest = text.partition(CALL)
        self.calls = mark + rest
        wait = 0 if mark else max((n for n in range(1, len(CALL)) if words.endswith(CALL[:n])), default=0)
        self.held = words[len(words) - wait:]
        return words[:len(words) - wait]

    def end(self):
        """(words that were held back, calls). A call that is not JSON remains words."""
        words, self.held = self.held, ""
        parts = re.findall(f"{CALL}(.*?)(?:{CALL_END}|(?={CALL})|$)", self.calls, re.DOTALL)
        calls = [read_call(part) for part in parts]
        if not calls or None in calls:
            return words + self.calls, []
        return words, calls


def read_call(text):
    """{"name": ..., "arguments": {...}} -> what OpenAI calls a tool call, or None."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call["arguments"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return dict(id=f"call_{secrets.token_hex(12)}", type="function", function=dict(name=name, arguments=arguments))


def plain_message(message):
    """A Message as chat templates expect it: one text, system for developer, arguments as an object."""
    plain = message.model_dump(exclude_none=True, exclude={"refusal", "annotations"})
    if message.role == "developer":
        plain["role"] = "system"
    if isinstance(message.content, list):
        plain["content"] = "".join(part.text for part in message.content)
    if not message.tool_calls:
        plain.pop("tool_calls", None)
        if message.content is None:
            raise ApiError(400, f"a message of the {message.role} has no content", "messages")
    for call in plain.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        except (ValueError, RecursionError):
            raise ApiError(400, "the arguments of a tool call in messages are not JSON", "messages") from None
    return plain


def call_schema(tools):
    """The JSON schema of a call to one of these tools, each a Tool."""
    definitions, calls = {}, []
    for tool in tools:
        parameters = dict(tool.function.parameters)
        definitions |= parameters.pop("$defs", {})                 # references count from the root of the schema
        calls.append({"type": "object", "required": ["name", "arguments"], "additionalProperties": False,
                      "properties": {"name": {"const": tool.function.name}, "arguments": parameters}})
    return {"anyOf": calls} | ({"$defs": definitions} if definitions else {})
