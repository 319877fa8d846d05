/* In-flight tracking of split rings, by a server that is killed after each of its stores. */
#include "inflight_kills.h"

static const struct test tests[] = {TEST(killed_after_each_store)};
MAIN(tests)
