/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Connections of a prober or of the daemon. The table shows what each packet does in each state. "drop" is hidden from
 * the client's TCP:
 *
 *   packet of           | OBSERVING        | TAKEN                    | HANDING                 | HANDED
 *   --------------------|------------------|--------------------------|-------------------------|----------------------
 *   owner: SYN again    | pass             | SYN-ACK again; if not    | drop                    | drop
 *                       |                  | acknowledged within      |                         |
 *                       |                  | ANSWER_LOST_NS: pass,    |                         |
 *                       |                  | OBSERVING, trust is lost |                         |
 *   owner: other SYN    | ends; decided as a new connection: fresh, trusted → SYN-ACK, TAKEN; else pass, OBSERVING
 *   owner: ACK          | pass             | drop; a keep-alive       | a keep-alive: SYN to the| translate
 *                       |                  | → SYN to the pod, HANDING| pod again; else drop    |
 *   owner: data         | record; pass; not| first byte: answered, or | record; first byte: SYN | record; translate
 *                       | a question: ends | recorded if a question,  | to the pod again; what  |
 *                       |                  | stored, SYN to the pod,  | follows: stored; drop   |
 *                       |                  | HANDING; else drop       |                         |
 *   owner: FIN          | record, ends, or | nothing outstanding: RST | record; stored if it    | record, DONE;
 *                       | DONE if awaited; | → client, ends; else drop| follows what is stored; | translate
 *                       | pass             |                          | DONE; drop              |
 *   owner: RST          | record, ends;    | ends; drop               | record, ends; drop      | record; translate,
 *                       | pass; of another |                          |                         | ends
 *                       | ISN: pass        |                          |                         |
 *   any other sender's  | ends; decided as if there had been no flow
 *   pod: SYN-ACK to the | record; pass     | pass                     | record; ACK with what is| record; the same ACK
 *   client's ISN        |                  |                          | stored → pod, HANDED    | → pod, again
 *   pod: other SYN-ACK  | pass             | pass                     | pass, CONTESTED         | ends; pass
 *   pod: RST            | withdraw unless  | pass                     | to the client's ISN:    | withdraw unless
 *                       | ANSWERED or DONE;|                          | withdraw, record, RST → | ANSWERED or DONE;
 *                       | record, ends;    |                          | client, ends; else pass | record; translate,
 *                       | pass             |                          |                         | ends
 *   pod: ACK, data, FIN | record; pass;    | pass                     | to another ISN, and not | record; translate;
 *                       | status 300 or    |                          | CONTESTED: RST → pod;   | status 300 or
 *                       | above: withdraw; |                          | else pass               | above: withdraw
 *                       | after DONE: ends |                          |                         |
 *   both FINs acked     |                  |                          |                         | ends
 *   deadline, since     | CONNECTING_NS,   | TAKEN_NS, its SYN        | HANDING_NS, the last SYN| HANDED_NS, the
 *                       | its SYN; then    |                          | to the pod              | owner's last packet
 *                       | OBSERVING_NS, the|                          |                         |
 *                       | pod's SYN-ACK;   |                          |                         |
 *                       | then LATE_NS, the|                          |                         |
 *                       | owner's FIN      |                          |                         | of a probe that
 *                       |                  |                          |                         | is closed LATE_NS
 *
 * If an owner vanishes without a FIN or RST passing here, its flow stays until sweep removes it after the deadline. It
 * is harmless until then, because packets of other senders are never mistaken for the owner's.
 *
 * OWN: a connection of the daemon to a port with a TCP endpoint. Everything passes. The pod's SYN-ACK is noted, as for
 * a prober; it or an RST ends the flow. The Go model leaves OWN out, because test runs have no sockets.
 *
 * DONE: the connection is no longer recorded, because its client has closed or it is not a probe.
 * Awaited: traffic may vouch for what was asked, and the pod has not answered yet. It then ends with the pod's answer
 * or FIN ("after DONE: ends").
 * ANSWERED: the first bytes of an answer were seen. The daemon judges whether a reset after them is a failure.
 *
 * The last acknowledgement ends a flow as it passes. If it gets lost between us and its receiver, the repeated FIN is
 * no longer translated, and that side's socket waits in LAST_ACK until its kernel gives up. By then all data has
 * arrived.
 */
#ifndef PROBELET_FLOW_H
#define PROBELET_FLOW_H

#include "kernel.h"
#include "maps.h"
#include "parse.h"

#define CONNECTING_NS (30 * SECOND_NS) /* a client that gives up connecting sends nothing */
#define OWN_NS (3 * SECOND_NS)	       /* if the daemon repeats its SYN later, another flow begins */
#define OBSERVING_NS (600 * SECOND_NS)
#define LATE_NS (60 * SECOND_NS)	/* as long as Linux remembers a closed connection (tcp_fin_timeout) */
#define TAKEN_NS (3 * 3600 * SECOND_NS) /* more than 2 h, after which Linux sends a keep-alive (tcp_keepalive_time) */
#define HANDING_NS (130 * SECOND_NS)	/* more than 120 s, Linux's longest retransmission timeout (TCP_RTO_MAX) */
#define HANDED_NS (3 * 3600 * SECOND_NS)

#define DEFAULT_MSS 536 /* RFC 9293, section 3.7.1 */

#define SOCK_STREAM 1

/*
 * Reports whether a packet to the pod comes from the flow's socket, or from the kernel on behalf of one that is gone (a
 * RST, or an ACK in TIME_WAIT). The kernel's own packets have no socket, or a raw one.
 */
static __always_inline bool is_from_owner(struct __sk_buff *skb, const struct flow *flow)
{
	struct bpf_sock *sk;

	if (skb->ingress_ifindex) /* forwarded or bridged, from another machine or another pod */
		return false;
	if (bpf_get_socket_cookie(skb) == flow->owner)
		return true;
	sk = skb->sk;
	if (!sk)
		return true;
	sk = bpf_sk_fullsock(sk);
	return !sk || sk->type != SOCK_STREAM;
}

/* Sets flags of a flow in the map and returns all its flags. steer and observe may do so at the same time. */
static __always_inline __u32 set_flags(struct flow *flow, __u32 flags)
{
	return __sync_fetch_and_or(&flow->flags, flags) | flags;
}

static __always_inline void clear_flags(struct flow *flow, __u32 flags)
{
	__sync_fetch_and_and(&flow->flags, ~flags);
}

/* Sets the deadline of a flow. Also a barrier: steer and observe may both set it while a flow is being handed over. */
static __always_inline void set_deadline(struct flow *flow, __u64 from_now)
{
	__sync_lock_test_and_set(&flow->deadline, bpf_ktime_get_boot_ns() + from_now);
}

static __always_inline bool add_flow(const struct flow_key *key, const struct flow *flow)
{
	__u32 *slot = flow_port_slot(key->client_port);

	__sync_fetch_and_add(slot, 1);
	if (!bpf_map_update_elem(&flows, key, flow, BPF_NOEXIST))
		return true;
	__sync_fetch_and_add(slot, -1);
	return false;
}

static __always_inline void forget_stored(const struct flow_key *key, struct flow *flow)
{
	if (!(flow->flags & FLOW_STORED))
		return;
	clear_flags(flow, FLOW_STORED);
	bpf_map_delete_elem(&requests, key);
}

/* Removes a flow. Do not touch it afterwards: its memory may already be another flow's. */
static __always_inline void end_flow(const struct flow_key *key, struct flow *flow)
{
	forget_stored(key, flow);
	if (!bpf_map_delete_elem(&flows, key))
		__sync_fetch_and_add(flow_port_slot(key->client_port), -1);
}

/*
 * Stores a segment's payload and FIN, at an offset in the client's data, until the pod accepts the connection. Returns
 * false if they do not follow what is already stored, or do not fit.
 */
static __always_inline bool store(struct __sk_buff *skb, const struct segment *seg, struct flow *flow, __u32 offset)
{
	__u32 len = seg->payload, zero = 0;
	__u32 most = flow->client_mss ? flow->client_mss : DEFAULT_MSS; /* it must fit into one packet to the pod */
	struct stored *stored;

	if (offset + len > most || offset >= STORED_MAX || len > STORED_MAX || seg->tcp_flags & TCP_URG)
		return false;
	if (!(flow->flags & FLOW_STORED)) {
		if (offset)
			return false;
		stored = bpf_map_lookup_elem(&blank, &zero);
		if (!stored || bpf_map_update_elem(&requests, &seg->flow, stored, BPF_ANY))
			return false;
		set_flags(flow, FLOW_STORED);
	}
	stored = bpf_map_lookup_elem(&requests, &seg->flow);
	if (!stored || stored->len != offset || stored->fin)
		return false;
	if (len) {
		/* Verifiers before 6.3 do not conclude from the comparison that len is not 0. */
		asm volatile("" : "+r"(len));
		len = ((len - 1) & (STORED_MAX - 1)) + 1;
		asm volatile("" : "+r"(offset));
		offset &= STORED_MAX - 1;
		if (bpf_skb_load_bytes(skb, ETH_HLEN + seg->l3_len + seg->tcp_len, stored->bytes + offset, len))
			return false;
	}
	stored->sum = 0;
	for (int i = 0; i < STORED_MAX / 512; i++) /* the helper takes 512 bytes at a time */
		stored->sum = bpf_csum_diff(NULL, 0, (void *)(stored->bytes + 512 * i), 512, stored->sum);
	stored->owner = flow->owner;
	/* Set the length first, with a barrier: observe must not see the FIN together with the previous length. */
	__sync_lock_test_and_set(&stored->len, offset + len);
	stored->fin = !!(seg->tcp_flags & TCP_FIN);
	return true;
}

#endif
