"""Triton reads TRITON_INTERPRET when it is imported, so interpreted tests run in a process of their own."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
