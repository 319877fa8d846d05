/* The latency histogram: buckets and their floors. */
#include "harness.h"
#include "internal.h"

static void floors_rise(void)
{
    for (uint32_t b = 1; b < VHOST_HISTOGRAM_BUCKETS; b++)
        CHECK(vhost_histogram_floor(b) > vhost_histogram_floor(b - 1));
}

static void a_floor_is_in_its_own_bucket(void)
{
    for (uint32_t b = 0; b < VHOST_HISTOGRAM_BUCKETS; b++)
        CHECK_EQ(histogram_bucket(vhost_histogram_floor(b)), b);
}

static void the_value_below_a_floor_is_in_the_bucket_before(void)
{
    for (uint32_t b = 1; b < VHOST_HISTOGRAM_BUCKETS; b++)
        CHECK_EQ(histogram_bucket(vhost_histogram_floor(b) - 1), b - 1);
}

static void buckets_never_fall(void)
{
    uint32_t last = 0;

    for (uint64_t ns = 0; ns < 100000; ns++) {
        uint32_t b = histogram_bucket(ns);
        CHECK(b == last || b == last + 1);
        last = b;
    }
}

static void a_bucket_is_at_most_an_eighth_wide(void)
{
    for (uint32_t b = 1; b + 1 < VHOST_HISTOGRAM_BUCKETS; b++) {
        uint64_t low = vhost_histogram_floor(b), high = vhost_histogram_floor(b + 1);
        CHECK(high - low == 1 || (high - low) * 8 <= low);
    }
}

static void what_is_too_long_falls_into_the_last(void)
{
    CHECK_EQ(histogram_bucket(UINT64_MAX), VHOST_HISTOGRAM_BUCKETS - 1);
    CHECK_EQ(histogram_bucket(UINT64_C(1) << 63), VHOST_HISTOGRAM_BUCKETS - 1);
    /* Half an hour at least can be told from the last. */
    CHECK(histogram_bucket(UINT64_C(1800) * 1000000000) < VHOST_HISTOGRAM_BUCKETS);
}

static const struct test tests[] = {
    TEST(floors_rise),
    TEST(a_floor_is_in_its_own_bucket),
    TEST(the_value_below_a_floor_is_in_the_bucket_before),
    TEST(buckets_never_fall),
    TEST(a_bucket_is_at_most_an_eighth_wide),
    TEST(what_is_too_long_falls_into_the_last),
};
MAIN(tests)
