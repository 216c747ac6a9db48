/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What the kernel side and the Go side agree on: types, maps, limits. A change of it, and of the programs, needs a new
 * ABI number in bpf/datapath, because pinned objects of an older build are opened by name under that number.
 *
 * Times are nanoseconds of CLOCK_BOOTTIME: it goes on while a machine sleeps, so evidence ages there too.
 * Ports are in host byte order, addresses are 16 bytes in network order (IPv4 as ::ffff:a.b.c.d).
 */
#ifndef PROBELET_ABI_H
#define PROBELET_ABI_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define REQUEST_MAX 1024 /* longest HTTP request that is read, in bytes */
#define PATH_MAX 255	 /* longest path and query that is answered */
#define REPLY_MAX 128	 /* longest prebuilt reply */
#define PROBER_CGROUPS_MAX 4

/*
 * How long after its SYN a taken connection may still be answered although the evidence has expired meanwhile: it was
 * fresh when the connection was taken. Kubernetes' default probe timeout; a prober sends its request at once.
 */
#define TAKEN_GRACE_NS 1000000000ULL

/*
 * For how long the answer to a SYN is on its way at the most: it stays on one machine, and on one CPU mostly. Clients
 * repeat a SYN after 1 s.
 */
#define ANSWER_LOST_NS 500000000ULL

enum endpoint_kind {
	KIND_PORT = 0, /* all endpoints of a port: may a connection to it be taken? */
	KIND_TCP = 1,
	KIND_HTTP = 2,
};

struct endpoint_key {
	__u64 path_hash; /* FNV-1a of path and query as sent; 0 unless KIND_HTTP */
	__u16 port;
	__u8 kind; /* enum endpoint_kind */
	__u8 pad[5];
};

enum evidence_result {
	RESULT_UNKNOWN = 0,
	RESULT_SUCCESS = 1,
	RESULT_FAILURE = 2,
};

struct evidence {
	__u64 observed_at; /* of a success: when it was asked for. KIND_PORT: the oldest of the port's endpoints */
	__u64 fresh_until; /* 0: never to be answered. KIND_PORT: the earliest of the port's endpoints */
	__u32 reply_sum;   /* ones' complement sum of reply, not folded into the checksum yet */
	__u16 status;	   /* last HTTP status seen, 0 if none */
	__u16 reply_len;
	__u8 result; /* enum evidence_result, of the last outcome */
	__u8 pad[7];
	__u8 reply[REPLY_MAX];
};

enum withdrawal_cause {
	WITHDRAWN_LISTENER_CLOSED = 1,
	WITHDRAWN_RESET = 2,  /* the pod refused or reset a probe's connection */
	WITHDRAWN_STATUS = 3, /* the pod answered a probe with another status than 2xx */
};

struct tally {
	__u64 hits;	      /* probes answered in the kernel */
	__u64 answered_at;    /* the last of them */
	__u64 withdrawn_at;   /* KIND_PORT: evidence observed until then is void, whatever its bound */
	__u8 withdrawn_cause; /* KIND_PORT: enum withdrawal_cause */
	__u8 pad[7];
};

struct prober_config {
	__u64 cgroup_ids[PROBER_CGROUPS_MAX]; /* 0: slot unused */
	__u32 any_local;		      /* every process of this network namespace is a prober */
	__u32 pad;
};

enum outcome_event {
	OUTCOME_CONNECTED = 1, /* TCP handshake done, then closed by the client without a request */
	OUTCOME_STATUS = 2,    /* HTTP status line seen; 2xx is reported when the client has closed */
	OUTCOME_RESET = 3,     /* the pod refused or reset the connection */
	OUTCOME_NO_ANSWER = 4, /* the client closed before the pod had answered */
};

struct outcome {
	__u64 observed_at;
	__u64 duration; /* ns from the SYN to observed_at */
	__u64 path_hash;
	__u32 ifindex;
	__u16 port;
	__u16 status;
	__u8 kind;  /* enum endpoint_kind; KIND_PORT: concerns every endpoint of the port */
	__u8 event; /* enum outcome_event */
	__u8 pad[6];
};

enum flow_state {
	FLOW_OBSERVING = 1, /* passed on; the pod's reply is awaited */
	FLOW_TAKEN = 2,	    /* exists between the client and us only */
	FLOW_HANDING = 3,   /* its SYN was replayed towards the pod */
	FLOW_HANDED = 4,    /* spliced: sequence numbers are translated until it ends */
};

enum flow_flag {
	FLOW_CONNECTED = 1 << 0, /* observing: the pod's SYN-ACK was seen; taken: the client has ours */
	FLOW_REQUESTED = 1 << 1, /* observing: the request was seen; taken: it was answered */
	FLOW_CLIENT_FIN = 1 << 2,
	FLOW_CLIENT_FIN_ACKED = 1 << 3,
	FLOW_POD_FIN = 1 << 4,
	FLOW_POD_FIN_ACKED = 1 << 5,
};

struct flow_key {
	__u8 client_addr[16];
	__u8 pod_addr[16];
	__u32 ifindex; /* of the host-side veth: a pod cannot reach another's flows */
	__u16 client_port;
	__u16 pod_port;
};

struct flow {
	__u64 started_at; /* when its SYN was seen */
	__u64 path_hash;  /* observing: what was asked for */
	__u32 client_isn;
	__u32 our_isn;	  /* taken and later: the one we gave the client */
	__u32 pod_isn;	  /* observing, handed over: the pod's */
	__u32 client_fin; /* handed over: sequence number after the client's FIN */
	__u32 pod_fin;	  /* handed over: sequence number after the pod's FIN, as the pod counts */
	__u16 client_mss; /* 0 if the client's SYN named none */
	__u16 status;	  /* observing: the HTTP status seen, 0 if none yet */
	__u8 state;	  /* enum flow_state */
	__u8 flags;	  /* enum flow_flag */
	__u8 pad[6];
};

enum counter {
	COUNT_ANSWERED_HTTP,	   /* probes */
	COUNT_ANSWERED_TCP,	   /* probes */
	COUNT_OBSERVED,		   /* probes whose outcome was reported */
	COUNT_HANDED_OVER,	   /* connections */
	COUNT_PASSED_NOT_FRESH,	   /* connections of a prober to a probed port */
	COUNT_PASSED_NOT_PROBED,   /* connections of a prober to a port without probes */
	COUNT_PASSED_NOT_PARSABLE, /* packets or requests of a prober that are not understood */
	COUNT_PASSED_NOT_PROBER,   /* packets */
	COUNT_PASSED_OWN,	   /* connections of the daemon */
	COUNT_DROPPED,		   /* packets: steered, and no longer to be acted on */
	COUNT_OUTCOMES_LOST,	   /* outcomes that did not fit the ring buffer */
	/* ports that were fresh until then */
	COUNT_WITHDRAWN_LISTENER_CLOSED,
	COUNT_WITHDRAWN_RESET,
	COUNT_WITHDRAWN_STATUS,
	COUNT_MAX,
};

/* Answers are counted by the age of their evidence: of each bucket the longest, in ns; the last one has none. */
#define AGE_BOUNDS                                                                                                     \
	{100000000ULL,	250000000ULL,	500000000ULL,	1000000000ULL,	2500000000ULL,                                 \
	 5000000000ULL, 10000000000ULL, 30000000000ULL, 60000000000ULL, 300000000000ULL}
enum age {
	AGE_BOUNDED = 10, /* buckets with a bound */
	AGE_SUM = 11,	  /* of all ages, in ns */
	AGE_MAX,
};

/*
 * What steer tells respond to do, written behind the TCP header of the steered packet. All decisions are steer's;
 * respond obeys, so a packet needs no state but its own.
 */
enum order_verdict {
	ORDER_DROP = 0,
	ORDER_TO_CLIENT = 1,
	ORDER_TO_POD = 2,
};

struct order {
	__u64 token; /* order_token: a pod cannot forge an order */
	__u64 path_hash;
	__u32 seq;
	__u32 ack;
	__u16 mss; /* 0: no MSS option */
	__u16 window;
	__u8 verdict; /* enum order_verdict */
	__u8 tcp_flags;
	__u8 with_reply; /* append the reply of the endpoint path_hash */
	__u8 answers;	 /* enum endpoint_kind that this packet answers for the first time, 0: none */
};

/* A steered packet has room behind its TCP header for the largest answer, so that respond only ever shrinks it. */
#define STEERED_ROOM (4 + REPLY_MAX)
_Static_assert(sizeof(struct order) <= STEERED_ROOM, "an order fits a steered packet");

/*
 * EtherType of a steered packet (IEEE 802 local experimental 1) on its way from steer to respond: whatever happens
 * there, no protocol of the host and no bridge takes it for the client's packet.
 */
#define ETH_P_STEERED 0x88B5

/* Makes the compiler describe these types in BTF: the maps below and the generated Go need them. */
const struct endpoint_key *btf_endpoint_key __attribute__((unused));
const struct evidence *btf_evidence __attribute__((unused));
const struct tally *btf_tally __attribute__((unused));
const struct outcome *btf_outcome __attribute__((unused));
const struct order *btf_order __attribute__((unused));
const enum endpoint_kind *btf_endpoint_kind __attribute__((unused));
const enum evidence_result *btf_evidence_result __attribute__((unused));
const enum outcome_event *btf_outcome_event __attribute__((unused));
const enum flow_state *btf_flow_state __attribute__((unused));
const enum counter *btf_counter __attribute__((unused));
const enum withdrawal_cause *btf_withdrawal_cause __attribute__((unused));
const enum age *btf_age __attribute__((unused));

/* Drawn by the loader, never readable by a pod. */
const volatile __u64 order_token = 0;
/* bpf_xdp_load_bytes exists (5.18). Without it generic XDP linearizes, so that direct access sees the payload. */
const volatile bool have_xdp_load_bytes = false;

/* key 0; value: who probes. Written by the daemon, read by steer. Lives until the pins are removed. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct prober_config);
} prober SEC(".maps");

/*
 * key: cookie of a socket of the daemon's; value: unused. Its connection is passed on like anybody's, whoever the
 * prober is. Written by the daemon before it connects, and removed by it once that is done; read by steer at a SYN.
 * LRU, so that those of a daemon that was killed cannot fill it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u8);
} own_sockets SEC(".maps");

#define ENDPOINTS_PER_POD 64
#define PODS_MAX 4096

/*
 * One pod's evidence: struct endpoint_key, struct evidence. Written by the daemon only, read by steer and respond.
 * Lives as long as the pod's attachment. (Sizes, not types: kernels before 6.2 want a map without BTF here, as ADD
 * makes it.)
 */
struct evidence_of_pod {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ENDPOINTS_PER_POD);
	__uint(key_size, sizeof(struct endpoint_key));
	__uint(value_size, sizeof(struct evidence));
};

/* One pod's tallies: struct endpoint_key, struct tally. Records are created by the daemon (zero) beside the evidence
 * and then written by the kernel only, so that neither writer overwrites the other. */
struct tallies_of_pod {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, ENDPOINTS_PER_POD);
	__uint(key_size, sizeof(struct endpoint_key));
	__uint(value_size, sizeof(struct tally));
};

/* key: ifindex of the host-side veth; value: the pod's map. Put in at ADD, taken out at DEL; read by both programs. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, PODS_MAX);
	__type(key, __u32);
	__array(values, struct evidence_of_pod);
} pod_evidence SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, PODS_MAX);
	__type(key, __u32);
	__array(values, struct tallies_of_pod);
} pod_tallies SEC(".maps");

#define DEVICES_PER_NETNS 4 /* interfaces of one pod that are attached */

struct netns_devices {
	__u32 ifindex[DEVICES_PER_NETNS]; /* of the host-side veths; 0: slot unused */
};

/* key: inode number of a pod's network namespace; value: its devices. Written at ADD and DEL, read by watch. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PODS_MAX);
	__type(key, __u32);
	__type(value, struct netns_devices);
} pod_netns SEC(".maps");

/*
 * A prober's connections. Created by steer at a SYN, changed by both programs, removed when the connection ends or the
 * probe's outcome is known. LRU, so that connections whose end was never seen cannot fill it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

/* Outcomes of probes that were passed on. Written by both programs, read by the daemon. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} outcomes SEC(".maps");

/* key: enum counter; value: per-CPU count. Written by both programs, read by people. Lives until the pins go. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNT_MAX);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* key: enum age, or the index of a bucket in AGE_BOUNDS; value: per-CPU count. Written by respond, read by the daemon.
 * Lives until the pins go. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, AGE_MAX);
	__type(key, __u32);
	__type(value, __u64);
} answer_ages SEC(".maps");

static __always_inline void add(void *per_cpu_array, __u32 index, __u64 n)
{
	__u64 *value = bpf_map_lookup_elem(per_cpu_array, &index);

	if (value)
		*value += n;
}

static __always_inline void count(__u32 counter)
{
	add(&counters, counter, 1);
}

static __always_inline void count_age(__u64 age)
{
	const __u64 bounds[] = AGE_BOUNDS;
	__u32 bucket = 0;

	for (__u32 i = 0; i < AGE_BOUNDED; i++)
		bucket += age > bounds[i];
	add(&answer_ages, bucket, 1);
	add(&answer_ages, AGE_SUM, age);
}

#endif
