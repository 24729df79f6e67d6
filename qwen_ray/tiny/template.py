"""The text format of the base: one question, one answer, end of text.

Pretraining, fine-tuning on chat messages and multiple-choice prompts all use it, so no
part of the model's small capacity goes into a second format. The functions render single
turns; ``CHAT_TEMPLATE`` is the same format for ``tokenizer.apply_chat_template``. A user
turn already ends where the answer begins, so a generation prompt adds nothing.
"""

END_OF_TEXT = "<|endoftext|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ 'Question: ' + message['content'] + '\\nAnswer:' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ ' ' + message['content'] + '" + END_OF_TEXT + "' }}"
    "{%- elif message['role'] == 'system' -%}"
    "{{ message['content'] + '\\n\\n' }}"
    "{%- else -%}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def user_turn(content: str) -> str:
    """A user message as the model reads it."""
    return f"Question: {content}\nAnswer:"


def assistant_turn(content: str) -> str:
    """An assistant message as the model reads and writes it."""
    return f" {content}{END_OF_TEXT}"
