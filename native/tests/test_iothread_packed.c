/* The life of queues, on packed rings. */
#define PACKED_RINGS
#include "test_iothread.c"
