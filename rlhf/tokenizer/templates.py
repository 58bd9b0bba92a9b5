"""Chat templates for tokenizers without one."""

from transformers import PreTrainedTokenizerBase

from rlhf.errors import ConfigError

# How the chat templates that are made from a plain template begin.
PLAIN_TEMPLATE = (
    "{{- bos_token or '' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
)
PLAIN_ROLES = "the roles of data.template are system, user and assistant"


def chat_template(template: str) -> str:
    """Convert a plain prompt template to a Jinja chat template, as tokenizers have it.

    Args:
        template: Text around a prompt, with ``{prompt}`` in it once, such as ``"{prompt}\\nSummary:"``. The response
            follows after one space. Earlier responses of a conversation end with a blank line.

    Returns:
        Jinja source for ``tokenizer.chat_template``. It starts with BOS if the tokenizer has one, and ends a response
        with EOS. Roles other than ``system``, ``user`` and ``assistant`` are an error.
    """
    if template.count("{prompt}") != 1:
        raise ConfigError(
            f"template must contain {{prompt}} once, got {template!r}.",
            'For example: data.template="{prompt}\\nSummary:"',
        )
    before, after = map(_jinja_string, template.split("{prompt}"))
    return (
        f"{PLAIN_TEMPLATE}"
        f"{{%- elif message['role'] == 'user' -%}}{{{{- {before} + message['content'] + {after} -}}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- ' ' + message['content'] + (eos_token if loop.last else '\\n\\n') -}}"
        f"{{%- else -%}}{{{{- raise_exception({_jinja_string(PLAIN_ROLES)}) -}}}}{{%- endif -%}}"
        "{%- endfor -%}"
    )


def is_plain_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template of a tokenizer was made by ``chat_template`` from a text around a prompt."""
    template = tokenizer.chat_template
    return isinstance(template, str) and template.startswith(PLAIN_TEMPLATE)


def _jinja_string(text: str) -> str:
    for char, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(char, escape)
    return f"'{text}'"
