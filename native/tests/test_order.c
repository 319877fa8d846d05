/* VIRTIO_F_IN_ORDER on split rings. */
#include "order_cases.h"

static const struct test tests[] = {ORDER_CASES};
MAIN(tests)
