/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Recording connections that reach the pod, for the daemon. */
#ifndef PROBELET_FLOW_RECORD_H
#define PROBELET_FLOW_RECORD_H

#include "count.h"
#include "flow.h"
#include "maps.h"
#include "parse.h"

/* A record being assembled. */
struct recording {
	struct record record;
	__u8 payload[RECORDED_MAX];
};

/* key: 0; value: working memory of record_packet, per CPU. Nothing in it outlives a packet. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct recording);
} recording SEC(".maps");

/* Returns how many of the len bytes at an offset are recorded. */
static __always_inline __u32 recorded_of(__u32 offset, __u32 len)
{
	if (offset >= RECORDED_MAX)
		return 0;
	return len < RECORDED_MAX - offset ? len : RECORDED_MAX - offset;
}

/* Appends a record to the ring. ends marks the last one of a connection. Returns false if there is no room. */
static __always_inline bool append(const struct recording *r, __u32 size, bool ends)
{
	/* Wake the daemon once per exchange, or before records get lost. */
	bool wake = ends || bpf_ringbuf_query(&records, BPF_RB_AVAIL_DATA) > RECORDS_BYTES / 4;

	return !bpf_ringbuf_output(&records, (void *)r, size, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

/*
 * Records a packet of an observed connection, if there is anything to record. Call it before changing the packet.
 * Returns 0. It is a global function so that the verifier checks it only once.
 */
__noinline int record_packet(struct __sk_buff *skb, const struct segment *seg, struct flow *flow, __u32 from_pod)
{
	__u32 zero = 0, bytes;
	struct recording *r;
	bool ends;

	if (!seg || !flow || flow->flags & (FLOW_DONE | FLOW_UNRECORDED))
		return 0;
	r = bpf_map_lookup_elem(&recording, &zero);
	if (!r)
		return 0;
	r->record.offset = r->record.len = 0;
	if (!(seg->tcp_flags & (TCP_SYN | TCP_RST))) {
		r->record.offset = seg->seq - 1 - (from_pod ? flow->pod_isn : flow->client_isn);
		r->record.len = seg->payload;
	}
	bytes = recorded_of(r->record.offset, r->record.len);
	if (!bytes && !(seg->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)))
		return 0;
	if (bytes) {
		asm volatile("" : "+r"(bytes)); /* as in store, for verifiers before 6.3 */
		bytes = ((bytes - 1) & (RECORDED_MAX - 1)) + 1;
		if (bpf_skb_load_bytes(skb, ETH_HLEN + seg->l3_len + seg->tcp_len, r->payload, bytes))
			bytes = 0;
	}
	r->record.owner = flow->owner;
	r->record.started_at = flow->started_at;
	r->record.observed_at = bpf_ktime_get_boot_ns();
	r->record.question = flow->question;
	r->record.device.ifindex = seg->flow.ifindex;
	r->record.device.generation = flow->generation;
	r->record.port = seg->flow.pod_port;
	r->record.from_pod = from_pod;
	r->record.tcp_flags = seg->tcp_flags;
	r->record.recorded = bytes;
	ends = seg->tcp_flags & TCP_RST || (!from_pod && seg->tcp_flags & TCP_FIN);
	if (!append(r, sizeof(r->record) + bytes, ends)) {
		set_flags(flow, FLOW_UNRECORDED);
		count(COUNT_RECORDS_LOST);
	} else if (ends) {
		set_flags(flow, FLOW_DONE);
		count(COUNT_OBSERVED);
	}
	return 0;
}

#endif
