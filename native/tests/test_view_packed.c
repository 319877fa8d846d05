/* Views of memory, with packed rings. */
#define PACKED_RINGS
#include "test_view.c"
