/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The contract between the BPF programs and Go: types and limits that both use. The maps are in maps.h. Any change here
 * or in the programs needs a new ABI in bpf/datapath, because builds with the same ABI share whatever the first of them
 * loaded and pinned.
 *
 * Times are nanoseconds of CLOCK_BOOTTIME, which keeps counting while a machine sleeps, so that evidence ages then,
 * too. Ports are in host byte order. Addresses are 16 bytes in network byte order (IPv4 as ::ffff:a.b.c.d).
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
#define RECORDED_MAX 16384 /* bytes recorded of what each side of a connection sends */
#define PROBER_CGROUPS_MAX 4
#define ENDPOINTS_PER_POD 64
#define PODS_MAX 4096
#define FLOWS_MAX 4096
#define DEVICES_PER_NETNS 4 /* attached interfaces of one pod */

/* Allow no holes, so that everything copied into a map or compared as a key is fully initialized. */
#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

#define SECOND_NS 1000000000ULL

/*
 * How long after the SYN a request on a taken connection may still be answered if the evidence has expired since then.
 * A prober sends its request immediately; this is Kubernetes' default probe timeout.
 */
#define TAKEN_GRACE_NS SECOND_NS

/*
 * An answer to a SYN that is not acknowledged within this time counts as lost, because it never leaves the machine. It
 * is shorter than the 1 s after which a client repeats its SYN.
 */
#define ANSWER_LOST_NS (SECOND_NS / 2)

enum endpoint_kind {
	KIND_PORT = 0, /* the port itself; decides whether connections to it are taken */
	KIND_TCP = 1,
	KIND_HTTP = 2,
};

/* One attachment of a device. The generation tells it from leftovers of an earlier pod, since ifindexes are reused. */
struct device_key {
	__u32 ifindex;	  /* of the host-side veth */
	__u32 generation; /* random, drawn for each attachment; never 0 */
};

/*
 * Identifies a whole request by two independent hashes of its bytes, under keys that pods cannot read (question_keys).
 * Two requests have the same hash with a probability of at most 2^-32, however they were chosen, and both the same hash
 * and check with at most 2^-64.
 */
struct question {
	__u64 hash;  /* identifies it in maps; 0: none */
	__u64 check; /* compared before it is answered */
};

/* The keys for 8 bytes of a request. */
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
	__u64 observed_at; /* success: start of the probe; failure: when it was detected */
	__u64 fresh_until; /* not answered from then on; 0: never answered */
	/* Answered until then, fresh or not, while traffic shows that the pod serves; 0: traffic is not evidence. */
	__u64 traffic_until;
	__u64 check;		 /* of the question; 0 unless KIND_HTTP */
	__u32 traffic_window_ms; /* how recently the pod must have served */
	__u16 status;		 /* last HTTP status, which answers use after a success; 0: none */
	__u8 result;		 /* enum evidence_result of the last outcome */
	__u8 pad[1];
	/*
	 * Checksum of the other fields and the key. The kernel reuses the memory of a deleted element immediately, so a
	 * program may read a value that has just become another endpoint's. The seal does not match then.
	 */
	__u64 seal;
};

enum withdrawal_cause {
	WITHDRAWN_LISTENER_CLOSED = 1,
	WITHDRAWN_RESET = 2,  /* the pod refused or reset a prober's connection */
	WITHDRAWN_STATUS = 3, /* the pod answered a probe with a status of 300 or above */
};

struct tally {
	__u64 hits;	      /* probes answered in the kernel */
	__u64 answered_at;    /* when the last of them was answered; 0: none */
	__u64 withdrawn_at;   /* voids evidence observed until then; with KIND_PORT that of all endpoints of the port */
	__u64 watched_at;     /* KIND_PORT: started_at of the flow watched for an acknowledgement; 0: none */
	__u16 watched_port;   /* KIND_PORT: client port of that flow */
	__u8 withdrawn_cause; /* enum withdrawal_cause; 0: never withdrawn */
	__u8 obstacle;	      /* KIND_PORT: the last enum obstacle; 0: none yet */
	/*
	 * KIND_PORT: TCP probes answered since the last connection known to have been accepted; other kinds: probes
	 * answered since the last one that was passed on.
	 */
	__u32 answered;
	/*
	 * KIND_PORT: when the pod's SYN-ACK to a prober or the daemon was seen, in us of CLOCK_MONOTONIC; 0: that
	 * connection is known to have been accepted, or there was none.
	 */
	__u64 connected_at;
	__u64 connected_to; /* KIND_PORT: the listening socket that sent it, as an address in kernel memory */
	__u64 asked_at; /* KIND_PORT: started_at of the connection last passed on; 0: the pod has answered it or a later
			   one */
	__u8 answered_max; /* KIND_PORT: upper limit of answered, as of the last look at the listening socket */
	__u8 pad[7];
	__u64 served_at; /* KIND_PORT: when the pod last began an HTTP response with a status below 500; 0: never */
	__u64 closed_at; /* KIND_PORT: when the pod last closed a connection; 0: never */
};

/*
 * Why a probe is not answered although the evidence is fresh. A look at the listening socket detects all but
 * OBSTACLE_UNANSWERED and, where traffic is evidence, OBSTACLE_REAL_DUE.
 */
enum obstacle {
	OBSTACLE_NO_LISTENER = 1, /* no socket of the pod listens there */
	OBSTACLE_QUEUE_LONG = 2,  /* one of its queues is more than half full */
	OBSTACLE_HEAD_OLD = 3,	  /* the first connection in its queue has been waiting for LISTENER_WAIT_US */
	OBSTACLE_SPECIAL = 4,	  /* it is bound to a device, or has a filter, a minimum TTL or keys */
	OBSTACLE_REAL_DUE = 5,	  /* answered has reached answered_max, or TRAFFIC_ANSWERS_MAX */
	OBSTACLE_UNANSWERED = 6,  /* the pod has not answered the SYN of the connection last passed on */
};

/* Where answers are made for a device. */
enum hook {
	HOOK_TC = 0,  /* in steer, in place */
	HOOK_XDP = 1, /* in respond, from steer's orders */
};

/* Whether a device's answers are known to reach their clients. */
enum trust {
	TRUST_UNPROVEN = 0, /* one connection is taken as a trial */
	TRUST_PROVEN = 1,
	TRUST_LOST = 2, /* no connection is taken until the device is attached, promoted or trusted again */
};

/* How the loss of an answer was detected. */
enum loss {
	LOSS_NONE = 0,
	LOSS_SYN_REPEATED = 1,	   /* the client repeated an answered SYN */
	LOSS_UNACKNOWLEDGED = 2,   /* the client sent nothing after its SYN was answered */
	LOSS_REQUEST_REPEATED = 3, /* the client repeated an answered request */
	LOSS_UNOBSERVED = 4,	   /* the client received the answer, but observe did not see it pass */
};

struct device {
	__u64 trial_at; /* when the trial connection was taken; 0: none yet */
	__u64 lost_at;	/* when trust was lost; 0: never */
	/* One 8-byte word, changed by compare-and-swap, because the memory may have become another device's. */
	__u32 generation;
	__u16 loss;    /* enum loss */
	__u16 trust;   /* enum trust */
	__u32 netns;   /* inode number of the pod's network namespace */
	__u8 hook;     /* enum hook */
	__u8 observed; /* 1: observe saw the trial's answer pass */
	__u16 pod_mtu; /* longest packet the pod accepts, in bytes, from the MSS of its SYN-ACKs; 0: not known yet */
	__u64 withdrawn_at; /* when a listening socket of the pod closed, which voids evidence observed until then */
	__u64 netns_cookie; /* of the pod's network namespace, never reused; 0: steer takes it from the first socket */
	__s32 nsid; /* id by which the host's namespace knows the pod's; -1: unknown, so no socket is examined */
	__u8 pad[4];
};

/* The endpoint keys of a device, so that DEL finds its evidence and tallies without searching the maps. */
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
	__u32 own_sockets;		      /* 1: the map own_sockets has been used, so it must be consulted */
	/* The process with this PID in that namespace (inode number); 0: every process in the cgroups is a prober. */
	__u32 pid;
	__u32 pid_namespace;
};

/*
 * A packet of an observed connection: the pod's SYN-ACK, and data, FINs and RSTs of both sides. The payload at offsets
 * below RECORDED_MAX in the sender's data follows it in the ring. The last record of a connection is the client's FIN
 * or RST, or the pod's RST. It is missing if an earlier record did not fit into the ring, or if the connection turned
 * out not to be a probe. In the latter case the last record is of the client's data, without a question.
 */
struct record {
	__u64 owner; /* of the flow; with started_at it identifies the connection */
	__u64 started_at;
	__u64 observed_at;
	struct question question; /* asked by the client; 0: none yet, or more than a request */
	struct device_key device;
	__u32 offset;	/* of the payload in the sender's data; 0 for a SYN or RST */
	__u32 len;	/* of the payload, in bytes; 0 for a SYN or RST */
	__u16 port;	/* of the pod */
	__u16 recorded; /* bytes of payload that follow */
	__u8 from_pod;	/* 1: the pod sent it, 0: the client */
	__u8 tcp_flags;
	__u8 pad[2];
};

/* See flow.h for the table of states and events. */
enum flow_state {
	FLOW_OBSERVING = 1, /* passed on to the pod, to learn from its reply */
	FLOW_TAKEN = 2,	    /* between the client and us; the pod is unaware of it */
	FLOW_HANDING = 3,   /* the client's SYN was replayed to the pod, which has not answered yet */
	FLOW_HANDED = 4,    /* spliced: sequence numbers are translated until it ends */
	FLOW_OWN = 5,	    /* the daemon's own connection, passed on; it ends with the pod's reply to the SYN */
};

enum flow_flag {
	FLOW_CONNECTED = 1 << 0,  /* observing: the pod's SYN-ACK was seen; taken: the client received ours */
	FLOW_REQUESTED = 1 << 1,  /* the client's request was seen, and in state taken also answered */
	FLOW_CLIENT_FIN = 1 << 2, /* this and the next three are for flows that are handed over */
	FLOW_CLIENT_FIN_ACKED = 1 << 3,
	FLOW_POD_FIN = 1 << 4,
	FLOW_POD_FIN_ACKED = 1 << 5,
	FLOW_STORED = 1 << 6,	   /* the client's data is in the map requests */
	FLOW_TRIAL = 1 << 7,	   /* the trial connection by which its device earns trust */
	FLOW_XDP = 1 << 8,	   /* its device's hook is HOOK_XDP */
	FLOW_DONE = 1 << 9,	   /* nothing more to record: its end was recorded, or it is not a probe */
	FLOW_CONTESTED = 1 << 10,  /* handing: the pod also answered a SYN of another connection on these ports */
	FLOW_ANSWERED = 1 << 11,   /* the first bytes of the pod's answer were seen */
	FLOW_UNRECORDED = 1 << 12, /* one of its records was lost, so no more are written */
	FLOW_BY_TRAFFIC = 1 << 13, /* taken only because of the pod's traffic */
};

struct flow_key {
	__u8 client_addr[16];
	__u8 pod_addr[16];
	__u32 ifindex; /* of the host-side veth, so that no pod can reach another's flows */
	__u16 client_port;
	__u16 pod_port;
};

struct flow {
	__u64 owner;		  /* cookie of the client's socket */
	__u64 started_at;	  /* when its first SYN was seen */
	__u64 deadline;		  /* sweep removes the flow after this time */
	__u64 evidence_at;	  /* taken: observed_at of the port's evidence */
	struct question question; /* asked by the client of the pod; 0: none yet */
	__u32 generation;	  /* of the device */
	__u32 client_isn;
	__u32 our_isn;	     /* from taken on: the initial sequence number we gave the client */
	__u32 pod_isn;	     /* observing, handed over: the pod's initial sequence number */
	__u32 client_fin;    /* handed over: sequence number after the client's FIN */
	__u32 pod_fin;	     /* handed over: sequence number after the pod's FIN, in the pod's numbering */
	__u32 flags;	     /* enum flow_flag; in the map, changed only by set_flags and clear_flags */
	__u16 client_mss;    /* 0 if the client's SYN had none; from taken on limited to pod_mtu */
	__u16 client_window; /* from handing on: window of the segment replayed as a SYN */
	__u8 state;	     /* enum flow_state */
	__u8 pad[7];
};

/* A client's data from its first byte on, kept while its connection is handed over. */
struct stored {
	__u64 owner; /* of the flow */
	__u32 len;   /* of the data, in bytes; at most STORED_MAX */
	__u32 sum;   /* ones' complement sum of bytes, not folded */
	__u32 fin;   /* 1: the client's FIN follows the data */
	__u32 pad;
	/* 0 beyond len. Twice as long as needed, because the verifier bounds offset and length separately. */
	__u8 bytes[2 * STORED_MAX];
};

enum counter {
	COUNT_ANSWERED_HTTP,	   /* probes */
	COUNT_ANSWERED_TCP,	   /* probes */
	COUNT_OBSERVED,		   /* connections recorded to their end */
	COUNT_HANDED_OVER,	   /* connections */
	COUNT_PASSED_NOT_FRESH,	   /* a prober's connections to a probed port without fresh evidence */
	COUNT_PASSED_NOT_PROBED,   /* a prober's connections to ports that have no probe */
	COUNT_PASSED_NOT_PARSABLE, /* a prober's connections with SYNs that only the pod can answer */
	COUNT_PASSED_NOT_PROBER,   /* connections of clients other than probers */
	COUNT_PASSED_OWN,	   /* the daemon's connections */
	COUNT_PASSED_UNTRUSTED,	   /* a prober's connections through a device that is not, or not yet, trusted */
	COUNT_PASSED_FULL,	   /* a prober's connections that did not fit into flows */
	COUNT_DROPPED,		   /* packets of taken connections that need no answer */
	COUNT_RECORDS_LOST,	   /* connections with a record that did not fit into the ring */
	COUNT_FLOWS_EXPIRED,	   /* connections removed by sweep */
	COUNT_DEVICES_LOST,	   /* devices that lost trust */
	/* ports (WITHDRAWN_STATUS: endpoints) whose evidence was still fresh when it was voided */
	COUNT_WITHDRAWN_LISTENER_CLOSED, /* listening sockets of pods; each voids all evidence of its pod */
	COUNT_WITHDRAWN_RESET,
	COUNT_WITHDRAWN_STATUS,
	/* a prober's connections to a port with fresh evidence, in the order of enum obstacle */
	COUNT_PASSED_NO_LISTENER,
	COUNT_PASSED_QUEUE_LONG,
	COUNT_PASSED_HEAD_OLD,
	COUNT_PASSED_SPECIAL,
	COUNT_PASSED_REAL_DUE,
	COUNT_PASSED_UNANSWERED,
	COUNT_MAX,
};

/* Upper bounds, in ns, of the histogram of answers by the age of their evidence. Its last bucket is unbounded. */
#define AGE_BOUNDS                                                                                                     \
	{100000000ULL,	250000000ULL,	500000000ULL,	1000000000ULL,	2500000000ULL,                                 \
	 5000000000ULL, 10000000000ULL, 30000000000ULL, 60000000000ULL, 300000000000ULL}
enum age {
	AGE_BOUNDED = 10, /* buckets with a bound */
	AGE_SUM = 11,	  /* sum of all ages, in ns; 10 is the unbounded bucket */
	AGE_MAX,
};

/* A reply, ready to be sent. */
struct reply_text {
	__u32 sum;	       /* ones' complement sum of bytes, not folded */
	__u32 len;	       /* in bytes */
	__u8 bytes[REPLY_MAX]; /* 0 beyond len */
};
/* The range of statuses that have a reply. */
#define STATUS_MIN 200
#define STATUS_MAX 299

#pragma clang diagnostic pop

/* These make the compiler emit BTF for the types, from which the Go side is generated. */
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
