"""Read a chat format from the tokenizer's template, or refuse it."""

from engine.errors import first_line

END_OF_THOUGHT = "</think>"


def chat_format(policy):
    """(ids that open a turn to be written, does the template drop the thoughts of past turns?)

    Both are read from the tokenizer's own template. The rest must be ChatML, else the model would
    see a format that it was not trained on: ValueError. To use a model with another format, change
    `Policy.message` and `Policy.past` until this function accepts it.
    """
    turns = [
        ("system", "Be brief."),
        ("user", "A room."),
        ("assistant", "look around"),
        ("user", "A hall.\n"),
        ("user", "\nTips:\n1. go on\n\n"),
        ("assistant", "<think>\nIt is dark.\n</think>\n\ngo to hall"),
        ("user", "x"),
    ]
    name = policy.tokenizer.name_or_path

    def template(to_be_continued):
        try:
            return policy.tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in turns],
                add_generation_prompt=to_be_continued,
                enable_thinking=False,  # Qwen3's; others do not ask
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:  # a damaged template raises whatever its code leads to
            raise ValueError(
                f"{name}: the tokenizer has no chat template that works "
                f"({first_line(error)}); use an instruction-tuned Qwen2/2.5/3"
            ) from error

    def ours(drops_thoughts):
        policy.drops_thoughts = drops_thoughts
        ids = []
        for role, text in turns:
            if role == "assistant":
                ids += policy.past([*policy.encode(text), policy.end_id])
            else:
                ids += policy.message(role, text)
        return ids

    if policy.tokenizer.decode(policy.encode("look around")) != "look around":
        raise ValueError(f"{name}: its tokenizer loses text; is tokenizer.json there?")
    past = template(False)
    header = template(True)[len(past) :]
    opening = policy.tokenizer.decode(header)
    if opening.count("<think>") > opening.count(END_OF_THOUGHT):
        raise ValueError(f"{name} always thinks before it answers; use its Instruct version")
    for drops_thoughts in (False, True):
        if ours(drops_thoughts) + header == template(True) and opening.startswith(
            policy.tokenizer.decode(policy.past_header)
        ):
            return header, drops_thoughts
    raise ValueError(
        f"{name}: its chat template is not the ChatML of Qwen2/2.5/3 Instruct "
        "(system, user, assistant between <|im_start|> and <|im_end|>); choose such a model"
    )
