/* The dirty log, on packed rings. */
#define PACKED_RINGS
#include "test_log.c"
