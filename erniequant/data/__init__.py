"""Texts, chats and records as users have them: files in the common formats, and Python objects.

Files are read a block at a time, so that memory does not depend on their size.
"""
