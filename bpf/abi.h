/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Types and limits shared by the BPF programs and Go; maps.h has the maps. Any change to them or to the programs needs
 * a new ABI in bpf/datapath, because builds with the same ABI share whatever the first of them loaded and pinned.
 *
 * Times are nanoseconds of CLOCK_BOOTTIME, which keeps counting while a machine sleeps, so evidence ages there too.
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
#include <linux/stddef.h>
#include <linux/tcp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define REQUEST_MAX 1024   /* longest HTTP request that is answered, in bytes; a power of two */
#define REPLY_MAX 128	   /* longest reply, in bytes; a power of two */
#define STORED_MAX 2048	   /* bytes of a client's data kept while its connection is handed over; a power of two */
#define RECORDED_MAX 16384 /* bytes that are recorded of what each side of a connection sends */
#define PROBER_CGROUPS_MAX 4
#define ENDPOINTS_PER_POD 64
#define PODS_MAX 4096
#define FLOWS_MAX 4096
#define DEVICES_PER_NETNS 4 /* attached interfaces of one pod */

/* No holes: whatever is copied into a map or compared as a key is written in full. */
#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

#define SECOND_NS 1000000000ULL

/*
 * How long after its SYN a request on a taken connection may still be answered if the evidence has expired since the
 * SYN. A prober sends its request at once; this is Kubernetes' default probe timeout.
 */
#define TAKEN_GRACE_NS SECOND_NS

/*
 * An answer to a SYN that is not acknowledged within this time was lost, because it never leaves the machine. Shorter
 * than the 1 s after which a client repeats its SYN.
 */
#define ANSWER_LOST_NS (SECOND_NS / 2)

enum endpoint_kind {
	KIND_PORT = 0, /* the port itself, which decides whether connections to it are taken */
	KIND_TCP = 1,
	KIND_HTTP = 2,
};

/* One attachment of a device. The kernel reuses ifindexes, so the generation keeps an earlier pod's leftovers apart. */
struct device_key {
	__u32 ifindex;	  /* of the host-side veth */
	__u32 generation; /* random, drawn for each attachment; never 0 */
};

/*
 * A request, whole: two independent hashes of its bytes, under keys that pods cannot read (question_keys). Two requests
 * have the same hash with a probability of 2^-32 at the most, whoever chose them, and the same check as well with
 * 2^-64.
 */
struct question {
	__u64 hash;  /* names it in maps; 0: none */
	__u64 check; /* is compared before it is answered */
};

/* Keys for 8 bytes of a request. */
struct question_key {
	__u32 hash[2], check[2];
};

struct endpoint_key {
	__u64 hash; /* of the question; 0 unless KIND_HTTP */
	struct device_key device;
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
	__u64 observed_at; /* success: when the probe began; failure: when it was seen */
	__u64 fresh_until; /* not answered from then on; 0: never answered */
	__u64 check;	   /* of the question; 0 unless KIND_HTTP */
	__u16 status;	   /* last HTTP status seen, with which a success is answered; 0: none */
	__u8 result;	   /* enum evidence_result of the last outcome */
	__u8 pad[5];
	/*
	 * Checksum of the other fields and the key. The kernel reuses the memory of a deleted element at once, so a
	 * program may be reading a value that has just become another endpoint's; the seal then does not match.
	 */
	__u64 seal;
};

enum withdrawal_cause {
	WITHDRAWN_LISTENER_CLOSED = 1,
	WITHDRAWN_RESET = 2,  /* the pod refused or reset a probe's connection */
	WITHDRAWN_STATUS = 3, /* the pod answered a probe with a status of 300 or above */
};

struct tally {
	__u64 hits;	      /* probes answered in the kernel */
	__u64 answered_at;    /* when the last of them was; 0: none */
	__u64 withdrawn_at;   /* voids evidence observed until then; of KIND_PORT: that of every endpoint of the port */
	__u64 watched_at;     /* KIND_PORT: started_at of the flow watched for an acknowledgement; 0: none */
	__u16 watched_port;   /* KIND_PORT: client port of that flow */
	__u8 withdrawn_cause; /* enum withdrawal_cause; 0: never withdrawn */
	__u8 obstacle;	      /* KIND_PORT: enum obstacle that was met last; 0: none yet */
	__u32 answered;	      /* KIND_PORT: TCP probes answered since a connection was last known to be accepted */
	/*
	 * KIND_PORT: when the pod's SYN-ACK to a prober was seen, in us of CLOCK_MONOTONIC; 0: that connection is known
	 * to be accepted, or there was none.
	 */
	__u64 connected_at;
	__u64 connected_to; /* KIND_PORT: the listening socket that sent it, by its address in the kernel's memory */
	__u64 asked_at;	   /* KIND_PORT: started_at of the connection last passed on; 0: the pod has answered its SYN */
	__u8 answered_max; /* KIND_PORT: answered may not exceed it, as of the last look at the listening socket */
	__u8 pad[7];
};

/* What keeps a probe from being answered although the evidence is fresh. All but the last need a look at its listening
 * socket. */
enum obstacle {
	OBSTACLE_NO_LISTENER = 1, /* the pod has no socket that listens there */
	OBSTACLE_QUEUE_LONG = 2,  /* one of its queues is more than half full */
	OBSTACLE_HEAD_OLD = 3,	  /* the first connection in its queue has waited for LISTENER_WAIT_US */
	OBSTACLE_SPECIAL = 4,	  /* it is bound to a device, or has a filter, a least TTL or keys */
	OBSTACLE_REAL_DUE = 5,	  /* enough have been answered since a connection was last known to be accepted */
	OBSTACLE_UNANSWERED = 6,  /* the pod has not answered the SYN of the connection last passed on */
};

/* Where a device's answers are made. */
enum hook {
	HOOK_TC = 0,  /* in steer, in place */
	HOOK_XDP = 1, /* in respond, from steer's orders */
};

/* Whether a device's answers are known to reach their clients. */
enum trust {
	TRUST_UNPROVEN = 0, /* one connection is taken to find out */
	TRUST_PROVEN = 1,
	TRUST_LOST = 2, /* no connection is taken until the device is attached, promoted or trusted again */
};

/* How an answer was found to be lost. */
enum loss {
	LOSS_NONE = 0,
	LOSS_SYN_REPEATED = 1,	   /* the client repeated an answered SYN */
	LOSS_UNACKNOWLEDGED = 2,   /* the client sent nothing after its SYN was answered */
	LOSS_REQUEST_REPEATED = 3, /* the client repeated an answered request */
	LOSS_UNOBSERVED = 4,	   /* the client has the answer, but observe did not see it pass */
};

struct device {
	__u64 trial_at; /* when the trial connection was taken; 0: none yet */
	__u64 lost_at;	/* when trust was lost; 0: it was not */
	/* One 8-byte word, changed by compare-and-swap, because the memory may have become another device's. */
	__u32 generation;
	__u16 loss;	    /* enum loss */
	__u16 trust;	    /* enum trust */
	__u32 netns;	    /* inode number of the pod's network namespace */
	__u8 hook;	    /* enum hook */
	__u8 observed;	    /* 1: observe saw the trial's answer pass */
	__u16 pod_mtu;	    /* longest packet the pod takes, in bytes, from the MSS of its SYN-ACKs; 0: not known yet */
	__u64 withdrawn_at; /* when a listening socket of the pod closed, which voids evidence observed until then */
	__u64 netns_cookie; /* of the pod's network namespace, never reused; 0: steer takes it from the first socket */
	__s32 nsid;	    /* by which the host's namespace knows the pod's; -1: not known, so nothing is looked at */
	__u8 pad[4];
};

/* The endpoint keys of a device, so that DEL finds its evidence and tallies without a search. */
struct endpoint_list {
	__u64 hashes[ENDPOINTS_PER_POD];
	__u32 ports[ENDPOINTS_PER_POD]; /* port << 16 | enum endpoint_kind */
	__u32 count;
	__u32 pad;
};

struct netns_devices {
	__u32 ifindex[DEVICES_PER_NETNS]; /* of the host-side veths; 0: slot unused */
};

struct prober_config {
	__u64 cgroup_ids[PROBER_CGROUPS_MAX]; /* 0: slot unused */
	__u32 any_local;		      /* 1: every process of this network namespace is a prober */
	__u32 own_sockets;		      /* 1: own_sockets has been used, so it must be looked up */
	/* A process with this number in that namespace (inode number); 0: every process of the cgroups is a prober. */
	__u32 pid;
	__u32 pid_namespace;
};

/*
 * A packet of an observed connection: the pod's SYN-ACK, and data, FINs and RSTs of both sides. Of what each side
 * sends, the bytes at offsets below RECORDED_MAX follow it in the ring. The last record of a connection is its client's
 * FIN or RST, or the pod's RST. There is none of a connection of which an earlier record did not fit into the ring, or
 * which turned out not to be a probe's: then the last is of the client's data, without a question.
 */
struct record {
	__u64 owner; /* of the flow; with started_at it identifies the connection */
	__u64 started_at;
	__u64 observed_at;
	struct question question; /* which the client has asked; 0: none yet, or more than a request */
	struct device_key device;
	__u32 offset;	/* of the payload, in what its sender sends; 0: the first byte, and that of a SYN or RST */
	__u32 len;	/* of the payload, in bytes; 0 of a SYN or RST */
	__u16 port;	/* the pod's */
	__u16 recorded; /* bytes of the payload that follow */
	__u8 from_pod;	/* 1: the pod sent it, 0: the client */
	__u8 tcp_flags;
	__u8 pad[2];
};

/* flow.h has the table of states and events. */
enum flow_state {
	FLOW_OBSERVING = 1, /* passed on to the pod, to learn from its reply */
	FLOW_TAKEN = 2,	    /* between the client and us; the pod does not know of it */
	FLOW_HANDING = 3,   /* the client's SYN was replayed to the pod, which has not answered yet */
	FLOW_HANDED = 4,    /* spliced: sequence numbers are translated until it ends */
};

enum flow_flag {
	FLOW_CONNECTED = 1 << 0,  /* observing: the pod's SYN-ACK was seen; taken: the client has ours */
	FLOW_REQUESTED = 1 << 1,  /* the client's request was seen; taken: and answered */
	FLOW_CLIENT_FIN = 1 << 2, /* this and the next three: handed over */
	FLOW_CLIENT_FIN_ACKED = 1 << 3,
	FLOW_POD_FIN = 1 << 4,
	FLOW_POD_FIN_ACKED = 1 << 5,
	FLOW_STORED = 1 << 6,	   /* the client's data is in the map requests */
	FLOW_TRIAL = 1 << 7,	   /* the connection by which its device earns trust */
	FLOW_XDP = 1 << 8,	   /* its device's hook is HOOK_XDP */
	FLOW_DONE = 1 << 9,	   /* nothing more is learned from it: its end was recorded, or it is not a probe's */
	FLOW_CONTESTED = 1 << 10,  /* handing: the pod also answered a SYN of another connection on these ports */
	FLOW_ANSWERED = 1 << 11,   /* the first bytes of the pod's answer were seen */
	FLOW_UNRECORDED = 1 << 12, /* a record of it was lost, so no more are written */
};

struct flow_key {
	__u8 client_addr[16];
	__u8 pod_addr[16];
	__u32 ifindex; /* of the host-side veth, so that no pod reaches another's flows */
	__u16 client_port;
	__u16 pod_port;
};

struct flow {
	__u64 owner;		  /* cookie of the client's socket */
	__u64 started_at;	  /* when its first SYN was seen */
	__u64 deadline;		  /* sweep removes the flow after this time */
	__u64 evidence_at;	  /* taken: observed_at of the port's evidence */
	struct question question; /* which the client has asked the pod; 0: none yet */
	__u32 generation;	  /* of the device */
	__u32 client_isn;
	__u32 our_isn;	     /* taken and later: the initial sequence number we gave the client */
	__u32 pod_isn;	     /* observing, handed over: the pod's initial sequence number */
	__u32 client_fin;    /* handed over: sequence number after the client's FIN */
	__u32 pod_fin;	     /* handed over: sequence number after the pod's FIN, in the pod's numbering */
	__u32 flags;	     /* enum flow_flag; once in the map, changed only by set_flags and clear_flags */
	__u16 client_mss;    /* 0 if the client's SYN had none; taken and later: limited to pod_mtu */
	__u16 client_window; /* handing and later: of the segment replayed as a SYN */
	__u8 state;	     /* enum flow_state */
	__u8 pad[7];
};

/* A client's data, from its first byte on, while its connection is handed over. */
struct stored {
	__u64 owner; /* of the flow */
	__u32 len;   /* of the data, in bytes; at most STORED_MAX */
	__u32 sum;   /* ones' complement sum of bytes, not folded */
	__u32 fin;   /* 1: the client's FIN follows the data */
	__u32 pad;
	__u8
	    bytes[2 * STORED_MAX]; /* 0 after len; twice as long, as the verifier bounds offset and length separately */
};

enum counter {
	COUNT_ANSWERED_HTTP,	   /* probes */
	COUNT_ANSWERED_TCP,	   /* probes */
	COUNT_OBSERVED,		   /* connections that were recorded to their end */
	COUNT_HANDED_OVER,	   /* connections */
	COUNT_PASSED_NOT_FRESH,	   /* a prober's connections to a probed port without fresh evidence */
	COUNT_PASSED_NOT_PROBED,   /* a prober's connections to ports that have no probe */
	COUNT_PASSED_NOT_PARSABLE, /* a prober's connections with SYNs that only the pod can answer */
	COUNT_PASSED_NOT_PROBER,   /* connections of anyone else */
	COUNT_PASSED_OWN,	   /* the daemon's connections */
	COUNT_PASSED_UNTRUSTED,	   /* a prober's connections by a device that is not trusted (yet) */
	COUNT_PASSED_FULL,	   /* a prober's connections for which flows had no room */
	COUNT_DROPPED,		   /* packets of taken connections that need no answer */
	COUNT_RECORDS_LOST,	   /* connections of which a record did not fit into the ring */
	COUNT_FLOWS_EXPIRED,	   /* connections removed by sweep */
	COUNT_DEVICES_LOST,	   /* devices that lost trust */
	/* ports (WITHDRAWN_STATUS: endpoints) whose evidence was fresh when it was voided */
	COUNT_WITHDRAWN_LISTENER_CLOSED, /* listening sockets of pods; each voids all evidence of its pod */
	COUNT_WITHDRAWN_RESET,
	COUNT_WITHDRAWN_STATUS,
	/* a prober's connections to a port with fresh evidence, by enum obstacle */
	COUNT_PASSED_NO_LISTENER,
	COUNT_PASSED_QUEUE_LONG,
	COUNT_PASSED_HEAD_OLD,
	COUNT_PASSED_SPECIAL,
	COUNT_PASSED_REAL_DUE,
	COUNT_PASSED_UNANSWERED,
	COUNT_MAX,
};

/* Bounds, in ns, of the buckets in which answers are counted by the age of their evidence; the last one has none. */
#define AGE_BOUNDS                                                                                                     \
	{100000000ULL,	250000000ULL,	500000000ULL,	1000000000ULL,	2500000000ULL,                                 \
	 5000000000ULL, 10000000000ULL, 30000000000ULL, 60000000000ULL, 300000000000ULL}
enum age {
	AGE_BOUNDED = 10, /* buckets with a bound */
	AGE_SUM = 11,	  /* sum of all ages, in ns; bucket 10 is the one without a bound */
	AGE_MAX,
};

/* A reply, ready to be sent. */
struct reply_text {
	__u32 sum;	       /* ones' complement sum of bytes, not folded */
	__u32 len;	       /* in bytes */
	__u8 bytes[REPLY_MAX]; /* 0 after len */
};
/* Statuses there is a reply for. */
#define STATUS_MIN 200
#define STATUS_MAX 299

#pragma clang diagnostic pop

/* These make the compiler describe the types in BTF, from which the Go side is generated. */
const struct record *btf_record __attribute__((unused));
const enum endpoint_kind *btf_endpoint_kind __attribute__((unused));
const enum evidence_result *btf_evidence_result __attribute__((unused));
const enum flow_state *btf_flow_state __attribute__((unused));
const enum flow_flag *btf_flow_flag __attribute__((unused));
const enum counter *btf_counter __attribute__((unused));
const enum withdrawal_cause *btf_withdrawal_cause __attribute__((unused));
const enum obstacle *btf_obstacle __attribute__((unused));
const enum age *btf_age __attribute__((unused));
const enum hook *btf_hook __attribute__((unused));
const enum trust *btf_trust __attribute__((unused));
const enum loss *btf_loss __attribute__((unused));

#endif
