/*
 * Which station is behind which port: the switch's table.
 *
 * It never grows.  A bucket is a cache line of four; where all are taken, the station goes that
 * was learned at the port with the most of them.  Besides, each port has a limit of its own.  So a
 * port that sends from ever new addresses pushes out its own stations, not those of others.
 */
#ifndef VHOST_STATIONS_H
#define VHOST_STATIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <vhost_switch.h>

enum { STATION_WAYS = 4, STATION_NONE = -1 };

/* An address in a VLAN: 12 bits over 48, the address as a big endian number; 0 is no station's. */
typedef uint64_t station_key;

struct station {
    station_key key; /* 0: free */
    uint32_t seen;   /* seconds of the caller's clock */
    uint16_t port;
    bool bound; /* stays until it is forgotten */
};

struct stations {
    struct station (*bucket)[STATION_WAYS];
    uint64_t seed; /* drawn: nobody can aim at a bucket */
    uint32_t mask; /* of buckets */
    uint32_t age;  /* seconds */
    uint32_t swept;
    uint32_t learned[VHOST_SWITCH_PORTS];
};

enum learned {
    STATION_LEARNED, /* or known to be there */
    STATION_FULL,    /* no room */
    STATION_BOUND,   /* to another port */
};

/* Room for `count` stations at least. -ENOMEM; -EINVAL: 0, or more than VHOST_SWITCH_STATIONS. */
int stations_open(struct stations *t, uint32_t count, uint32_t age);
void stations_close(struct stations *t);
/* `limit`: of what is learned at the port. */
enum learned stations_learn(struct stations *t, station_key key, uint16_t port, uint32_t limit,
                            uint32_t now);
/* Has it stay at this port. False: no room, or it is bound to another. */
bool stations_bind(struct stations *t, station_key key, uint16_t port, uint32_t now);
/* The port behind which a station is, or STATION_NONE. */
int stations_find(const struct stations *t, station_key key, uint32_t now);
void stations_forget(struct stations *t, uint16_t port);
uint32_t stations_read(const struct stations *t, struct vhost_switch_station *out, uint32_t max,
                       uint32_t now);

#endif
