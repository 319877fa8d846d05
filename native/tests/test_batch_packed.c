/* Batches, on packed rings. */
#define PACKED_RINGS
#include "test_batch.c"
