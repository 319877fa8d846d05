/* virtio-blk, on packed rings. */
#define PACKED_RINGS
#include "test_blk.c"
