/* What a drain makes of batches, on packed rings. */
#define PACKED_RINGS
#include "test_batch_drain.c"
