/* Polling and sleep, on packed rings. */
#define PACKED_RINGS
#include "test_polling.c"
