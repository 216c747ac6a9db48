/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Working memory that is too large for the stack. */
#ifndef PROBELET_SCRATCH_H
#define PROBELET_SCRATCH_H

#include "maps.h"

/* A snapshot of a listening socket (see listener.h). */
struct listener {
	__u64 id; /* its address in kernel memory */
	__u64 netns_cookie;
	__u64 head_at;	/* when the first connection in the accept queue got its SYN-ACK, in us of CLOCK_MONOTONIC */
	__u32 netns;	/* inode number */
	__u32 limit;	/* SYNs are dropped once more connections than this wait to be accepted */
	__u32 waiting;	/* connections in the accept queue */
	__u32 requests; /* connections in the making */
	bool waits;	/* the accept queue is not empty */
	bool special;	/* it does not accept packets from everywhere */
	bool shared;	/* others may listen on the same port (SO_REUSEPORT) */
};

struct scratch {
	struct flow flow;      /* being created */
	struct flow_key other; /* of the flow watched on a port */
	struct question asked; /* set by hash_request */
	union {		       /* copied from a packet; len bytes are valid */
		__u8 bytes[REQUEST_MAX];
		__u64 words[REQUEST_MAX / 8];
	};
	__u32 len;
	__u16 mss;		     /* set by read_syn_options */
	bool is_ipv4;		     /* of tuple */
	struct bpf_sock_tuple tuple; /* of a SYN to the pod */
	struct listener listener;    /* set by find_listener */
};

/* key: 0; value: working memory of steer and observe, per CPU. Nothing in it outlives one packet. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

static __always_inline struct scratch *get_scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

/* Copies len bytes of the packet to s->bytes. Returns false unless len is from 1 to max. */
static __always_inline bool load_scratch(struct __sk_buff *skb, struct scratch *s, __u32 offset, __u32 len, __u32 max)
{
	if (len < 1 || len > max)
		return false;
	s->len = len;
	/* For verifiers before 6.3, which do not conclude from the comparison that len is not 0. */
	asm volatile("" : "+r"(len));
	len = ((len - 1) & (REQUEST_MAX - 1)) + 1;
	return !bpf_skb_load_bytes(skb, offset, s->bytes, len);
}

#endif
