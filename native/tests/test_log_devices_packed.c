/* What devices log, on packed rings. */
#define PACKED_RINGS
#include "test_log_devices.c"
