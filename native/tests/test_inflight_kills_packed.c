/* In-flight tracking of packed rings, by a server that is killed after each of its stores. */
#define PACKED_RINGS
#include "inflight_kills.h"

static const struct test tests[] = {TEST(killed_after_each_store)};
MAIN(tests)
