# The cffi module generated from native/include/; its types are C's, so Any here.
from typing import Any

ffi: Any
lib: Any
