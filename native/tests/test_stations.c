/* The switch's table, with a clock of the test's own. */
#include "harness.h"
#include "stations.h"

enum { AGE = 300, MANY = 1000000 };

static struct stations table;

static void open_table(uint32_t room)
{
    CHECK_EQ(stations_open(&table, room, AGE), 0);
    table.seed = UINT64_C(0x0123456789abcdef); /* so that buckets fill alike each time */
}

static station_key key(uint32_t vlan, uint32_t number)
{
    return (station_key)vlan << 48 | UINT64_C(0x020000000000) | number;
}

static uint32_t known(uint32_t now)
{
    static struct vhost_switch_station out[65536];

    return stations_read(&table, out, 65536, now);
}

static void a_station_is_where_it_was_heard(void)
{
    open_table(64);
    CHECK_EQ(stations_find(&table, key(1, 1), 0), STATION_NONE);
    CHECK_EQ(stations_learn(&table, key(1, 1), 3, MANY, 0), STATION_LEARNED);
    CHECK_EQ(stations_learn(&table, key(2, 1), 4, MANY, 0), STATION_LEARNED);
    CHECK_EQ(stations_find(&table, key(1, 1), 0), 3);
    CHECK_EQ(stations_find(&table, key(2, 1), 0), 4);
    CHECK_EQ(stations_find(&table, key(1, 2), 0), STATION_NONE);
    CHECK_EQ(table.learned[3], 1);
    stations_close(&table);
}

static void a_station_moves(void)
{
    open_table(64);
    stations_learn(&table, key(1, 1), 3, MANY, 0);
    CHECK_EQ(stations_learn(&table, key(1, 1), 5, MANY, 1), STATION_LEARNED);
    CHECK_EQ(stations_find(&table, key(1, 1), 1), 5);
    CHECK_EQ(table.learned[3], 0);
    CHECK_EQ(table.learned[5], 1);
    CHECK_EQ(known(1), 1);
    stations_close(&table);
}

static void a_silent_station_is_forgotten(void)
{
    /* The clock is 32 bits of seconds, and wraps. */
    static const uint32_t start[] = {0, 1000, UINT32_MAX - 100};

    for (int i = 0; i < 3; i++) {
        uint32_t t = start[i];
        open_table(64);
        stations_learn(&table, key(1, 1), 3, MANY, t);
        stations_learn(&table, key(1, 2), 3, MANY, t);
        stations_learn(&table, key(1, 2), 3, MANY, t + 200);
        CHECK_EQ(stations_find(&table, key(1, 1), t + AGE), 3);
        CHECK_EQ(stations_find(&table, key(1, 1), t + AGE + 1), STATION_NONE);
        CHECK_EQ(stations_find(&table, key(1, 2), t + AGE + 1), 3);
        CHECK_EQ(known(t + AGE + 1), 1);
        /* What is heard of again is known again, and counted once. */
        stations_learn(&table, key(1, 1), 3, MANY, t + 1000);
        CHECK_EQ(stations_find(&table, key(1, 1), t + 1000), 3);
        CHECK_EQ(table.learned[3], 2);
        stations_close(&table);
    }
}

static void a_port_has_a_limit(void)
{
    open_table(1024);
    for (uint32_t i = 0; i < 10; i++)
        CHECK_EQ(stations_learn(&table, key(1, i), 3, 10, 0), STATION_LEARNED);
    CHECK_EQ(stations_learn(&table, key(1, 10), 3, 10, 0), STATION_FULL);
    CHECK_EQ(stations_find(&table, key(1, 10), 0), STATION_NONE);
    CHECK_EQ(stations_learn(&table, key(1, 5), 3, 10, 0), STATION_LEARNED);
    CHECK_EQ(stations_learn(&table, key(1, 10), 4, 10, 0), STATION_LEARNED);
    /* Nor does it get others' above it. */
    CHECK_EQ(stations_learn(&table, key(1, 10), 3, 10, 0), STATION_FULL);
    CHECK_EQ(stations_find(&table, key(1, 10), 0), 4);
    /* What has aged makes room. */
    CHECK_EQ(stations_learn(&table, key(1, 11), 3, 10, AGE + 1), STATION_LEARNED);
    CHECK_EQ(table.learned[3], 1);
    CHECK_EQ(stations_learn(&table, key(1, 12), 6, 0, 0), STATION_FULL);
    stations_close(&table);
}

/* A flood from one port, however large its limit is, leaves the stations of the others alone. */
static void a_flood_pushes_out_its_own(void)
{
    open_table(4096);
    for (uint32_t i = 0; i < 200; i++)
        CHECK_EQ(stations_learn(&table, key(1, i), (uint16_t)(i % 10), MANY, 0), STATION_LEARNED);
    for (uint32_t i = 0; i < 200000; i++)
        stations_learn(&table, key(1, 1000000 + i), 77, MANY, i / 1000);
    uint32_t lost = 0;
    for (uint32_t i = 0; i < 200; i++)
        lost += stations_find(&table, key(1, i), 200) == STATION_NONE;
    CHECK_EQ(lost, 0);
    CHECK(known(200) <= 4096);
    CHECK(table.learned[77] > 3000);
    /* And newcomers elsewhere find room at its cost. */
    for (uint32_t i = 0; i < 100; i++)
        CHECK_EQ(stations_learn(&table, key(2, i), 5, MANY, 200), STATION_LEARNED);
    stations_close(&table);
}

static void a_bound_station_stays(void)
{
    open_table(4);
    stations_learn(&table, key(1, 1), 4, MANY, 0);
    CHECK(stations_bind(&table, key(1, 1), 3, 0));
    CHECK_EQ(table.learned[4], 0);
    CHECK(!stations_bind(&table, key(1, 1), 4, 0));
    CHECK_EQ(stations_learn(&table, key(1, 1), 4, MANY, 5), STATION_BOUND);
    CHECK_EQ(stations_learn(&table, key(1, 1), 3, 0, 5), STATION_LEARNED);
    CHECK_EQ(stations_find(&table, key(1, 1), 5 + 10 * AGE), 3);
    for (uint32_t i = 0; i < 100; i++)
        stations_learn(&table, key(1, 10 + i), 5, MANY, 10);
    CHECK_EQ(stations_find(&table, key(1, 1), 10), 3);
    CHECK_EQ(known(10), 4);
    for (uint32_t i = 0; i < 3; i++)
        CHECK(stations_bind(&table, key(1, 200 + i), 6, 10));
    CHECK(!stations_bind(&table, key(1, 300), 6, 10));
    CHECK_EQ(stations_learn(&table, key(1, 400), 7, MANY, 10), STATION_FULL);
    stations_close(&table);
}

static void a_port_is_forgotten(void)
{
    open_table(4096);
    for (uint32_t i = 0; i < 40; i++)
        stations_learn(&table, key(1, i), (uint16_t)(i % 2), MANY, 0);
    CHECK(stations_bind(&table, key(1, 100), 1, 0));
    stations_forget(&table, 1);
    CHECK_EQ(known(0), 20);
    CHECK_EQ(table.learned[1], 0);
    CHECK_EQ(stations_find(&table, key(1, 100), 0), STATION_NONE);
    CHECK_EQ(stations_learn(&table, key(1, 100), 0, MANY, 0), STATION_LEARNED);
    CHECK_EQ(stations_find(&table, key(1, 0), 0), 0);
    stations_close(&table);
}

static void what_is_read_is_what_was_learned(void)
{
    struct vhost_switch_station out[4];

    open_table(64);
    stations_learn(&table, UINT64_C(0x0fff) << 48 | UINT64_C(0x02aabbccddee), 9, MANY, 100);
    CHECK_EQ(stations_read(&table, out, 4, 130), 1);
    CHECK_EQ(memcmp(out[0].mac, "\x02\xaa\xbb\xcc\xdd\xee", 6), 0);
    CHECK_EQ(out[0].vlan, 0xfff);
    CHECK_EQ(out[0].port, 9);
    CHECK_EQ(out[0].age_s, 30);
    CHECK(!out[0].bound);
    CHECK_EQ(stations_read(&table, out, 0, 130), 0);
    stations_close(&table);
}

static void a_table_of_no_room_is_refused(void)
{
    CHECK(stations_open(&table, 0, AGE) < 0);
    CHECK(stations_open(&table, VHOST_SWITCH_STATIONS + 1, AGE) < 0);
    open_table(1);
    stations_close(&table);
}

static const struct test tests[] = {
    TEST(a_station_is_where_it_was_heard),
    TEST(a_station_moves),
    TEST(a_silent_station_is_forgotten),
    TEST(a_port_has_a_limit),
    TEST(a_flood_pushes_out_its_own),
    TEST(a_bound_station_stays),
    TEST(a_port_is_forgotten),
    TEST(what_is_read_is_what_was_learned),
    TEST(a_table_of_no_room_is_refused),
};
MAIN(tests)
