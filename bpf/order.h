/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* What the programs tell each other through a packet. */
#ifndef PROBELET_ORDER_H
#define PROBELET_ORDER_H

#include "abi.h"

#pragma clang diagnostic push
#pragma clang diagnostic error "-Wpadded"

/* HOOK_XDP: tells respond what to turn a packet into. steer writes it behind the packet's TCP header. */
struct order {
	__u64 token; /* order_token, so that a pod cannot forge an order */
	__u32 seq;
	__u32 ack;
	__u16 mss; /* 0: no MSS option */
	__u16 window;
	__u16 status; /* of the reply to append; 0: none */
	__u8 tcp_flags;
	__u8 pad;
};

#pragma clang diagnostic pop

/* Makes the compiler emit BTF for the type, as in abi.h. */
const struct order *btf_order __attribute__((unused));

/* Room for an MSS option and the longest reply behind a steered packet's TCP header: respond only has to shrink it. */
#define STEERED_ROOM (4 + REPLY_MAX)
_Static_assert(sizeof(struct order) <= STEERED_ROOM, "an order must fit into a steered packet");

/*
 * EtherType of a packet on its way from steer to respond (IEEE 802 Local Experimental 1). If respond has been detached,
 * neither the host nor a bridge mistakes the packet for the client's. A pod may use the EtherType itself.
 */
#define ETH_P_STEERED 0x88B5

/*
 * skb->tc_index of a packet that our programs are done with: an answer on its way up, a packet redirected to the pod,
 * or a translated one. While attach.Promote has the programs attached twice, it makes the second copy ignore the
 * packet.
 */
#define HANDLED 0x7062
#define HANDLED_TRIAL 0x7063 /* the answer to a trial's SYN */

#endif
