/* When the bits of what was noted are set, on packed rings. */
#define PACKED_RINGS
#include "test_log_order.c"
