"""Triton reads TRITON_INTERPRET when it is imported, so interpreted tests run in a process of their own.

`test_interpreted.py` starts that process; collected directly, `interpreted/` would compile for a GPU that is not there.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
