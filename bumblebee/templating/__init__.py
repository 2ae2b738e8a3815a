"""The parts of chat_template.py: the sandbox, the default template, guarded text, turns, and from text to ids."""
