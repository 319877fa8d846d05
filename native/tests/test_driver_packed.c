/* The load generator, on packed rings. */
#define PACKED_RINGS
#include "test_driver.c"
