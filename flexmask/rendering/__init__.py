"""Chat templates, each text rendered and tokenised once, token for token as by the plain template.

`templates` says what a tokenizer's own template writes for a turn; `checks` that it writes all of
it. `loops` and `reads` find what a pass of a template's loop over messages depends on, so that
`memo` can remember it. `text_pieces` tokenises each piece of a text once.
"""
