"""The problems that students bring: each module yields one kind and its follow-up questions."""
