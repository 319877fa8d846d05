#include "stations.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

int stations_open(struct stations *t, uint32_t count, uint32_t age)
{
    uint32_t buckets = 1;

    if (count == 0 || count > VHOST_SWITCH_STATIONS)
        return -EINVAL;
    while (buckets * STATION_WAYS < count)
        buckets *= 2;
    *t = (struct stations){.mask = buckets - 1, .age = age};
    if (getrandom(&t->seed, sizeof(t->seed), 0) != sizeof(t->seed))
        return -errno;
    t->bucket = aligned_alloc(64, buckets * sizeof(*t->bucket));
    if (!t->bucket)
        return -ENOMEM;
    memset(t->bucket, 0, buckets * sizeof(*t->bucket));
    return 0;
}

void stations_close(struct stations *t)
{
    free(t->bucket);
    t->bucket = NULL;
}

static struct station *bucket_of(const struct stations *t, station_key key)
{
    uint64_t x = (key ^ t->seed) * UINT64_C(0x9e3779b97f4a7c15);

    x ^= x >> 32;
    x *= t->seed | 1;
    return t->bucket[(x >> 32) & t->mask];
}

static bool is_aged(const struct stations *t, const struct station *s, uint32_t now)
{
    return !s->bound && now - s->seen > t->age;
}

static void station_free(struct stations *t, struct station *s)
{
    if (s->key && !s->bound)
        t->learned[s->port]--;
    s->key = 0;
}

/* Frees what has aged, once a second at most: for a port that is at its limit. */
static void sweep(struct stations *t, uint32_t now)
{
    if (t->swept == now)
        return;
    t->swept = now;
    for (uint32_t i = 0; i <= t->mask; i++) {
        for (int way = 0; way < STATION_WAYS; way++) {
            if (t->bucket[i][way].key && is_aged(t, &t->bucket[i][way], now))
                station_free(t, &t->bucket[i][way]);
        }
    }
}

/* Whether `a` is to go rather than `b`. */
static bool goes_first(const struct stations *t, const struct station *a, const struct station *b)
{
    uint32_t many = t->learned[a->port], few = t->learned[b->port];

    return many != few ? many > few : (int32_t)(a->seen - b->seen) < 0;
}

/* Where a station of this port may be put, or NULL. */
static struct station *place_for(struct stations *t, struct station *bucket, uint16_t port,
                                 uint32_t now)
{
    struct station *victim = NULL;

    for (int way = 0; way < STATION_WAYS; way++) {
        struct station *s = &bucket[way];
        if (!s->key || is_aged(t, s, now))
            return s;
        if (!s->bound && (!victim || goes_first(t, s, victim)))
            victim = s;
    }
    /* Who has more than all others here may not push them out. */
    return victim && t->learned[port] > t->learned[victim->port] ? NULL : victim;
}

static struct station *find(struct station *bucket, station_key key)
{
    for (int way = 0; way < STATION_WAYS; way++) {
        if (bucket[way].key == key)
            return &bucket[way];
    }
    return NULL;
}

enum learned stations_learn(struct stations *t, station_key key, uint16_t port, uint32_t limit,
                            uint32_t now)
{
    struct station *bucket = bucket_of(t, key), *s = find(bucket, key);

    if (s && s->port == port) {
        if (s->seen != now)
            s->seen = now;
        return STATION_LEARNED;
    }
    if (s && s->bound)
        return STATION_BOUND;
    if (t->learned[port] >= limit)
        sweep(t, now);
    if (t->learned[port] >= limit)
        return STATION_FULL;
    /* One that has moved keeps its place. */
    if (!s || !s->key)
        s = place_for(t, bucket, port, now);
    if (!s)
        return STATION_FULL;
    station_free(t, s);
    *s = (struct station){.key = key, .seen = now, .port = port};
    t->learned[port]++;
    return STATION_LEARNED;
}

bool stations_bind(struct stations *t, station_key key, uint16_t port, uint32_t now)
{
    struct station *bucket = bucket_of(t, key), *s = find(bucket, key);

    if (s && s->bound)
        return s->port == port;
    for (int way = 0; !s && way < STATION_WAYS; way++) {
        if (!bucket[way].bound)
            s = &bucket[way];
    }
    if (!s)
        return false;
    station_free(t, s);
    *s = (struct station){.key = key, .seen = now, .port = port, .bound = true};
    return true;
}

int stations_find(const struct stations *t, station_key key, uint32_t now)
{
    const struct station *s = find(bucket_of(t, key), key);

    return s && !is_aged(t, s, now) ? s->port : STATION_NONE;
}

void stations_forget(struct stations *t, uint16_t port)
{
    for (uint32_t i = 0; i <= t->mask; i++) {
        for (int way = 0; way < STATION_WAYS; way++) {
            struct station *s = &t->bucket[i][way];
            if (s->key && s->port == port) {
                station_free(t, s);
                s->bound = false;
            }
        }
    }
}

uint32_t stations_read(const struct stations *t, struct vhost_switch_station *out, uint32_t max,
                       uint32_t now)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i <= t->mask; i++) {
        for (int way = 0; way < STATION_WAYS && n < max; way++) {
            const struct station *s = &t->bucket[i][way];
            if (!s->key || is_aged(t, s, now))
                continue;
            out[n] = (struct vhost_switch_station){
                .vlan = (uint16_t)(s->key >> 48),
                .port = s->port,
                .age_s = now - s->seen,
                .bound = s->bound,
            };
            for (int byte = 0; byte < 6; byte++)
                out[n].mac[byte] = (uint8_t)(s->key >> (40 - 8 * byte));
            n++;
        }
    }
    return n;
}
