/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Writing segments: a packet's headers are rewritten in place, never sent half-changed. */
#ifndef PROBELET_REPLY_H
#define PROBELET_REPLY_H

#include "abi.h"
#include "parse.h"

/* What a packet is to become. */
struct reply {
	__u32 seq;
	__u32 ack;
	__u16 mss; /* 0: no MSS option */
	__u16 window;
	__u8 tcp_flags;
	bool swap;     /* back to where the packet came from */
	__u32 payload; /* bytes that already stand behind the TCP header */
	__u32 payload_sum;
};

/* Ones' complement sum, 32 bits at a time; byte order does not matter to it (RFC 1071). */
static __always_inline __u64 sum_words(const void *words, __u32 bytes)
{
	const __u32 *word = words;
	__u64 sum = 0;

	for (__u32 i = 0; i < bytes / 4; i++)
		sum += word[i];
	return sum;
}

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* Sum of the TCP pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1). */
static __always_inline __u64 pseudo_sum(const void *ip, __u32 l3_len, __u32 tcp_bytes)
{
	__u64 sum = bpf_htonl(tcp_bytes) + (__u64)bpf_htonl(IPPROTO_TCP);

	if (l3_len == sizeof(struct iphdr))
		return sum + sum_words(ip + offsetof(struct iphdr, saddr), 8);
	return sum + sum_words(ip + offsetof(struct ipv6hdr, saddr), 32);
}

static __always_inline void swap_bytes(void *a, void *b, __u32 bytes)
{
	__u8 saved[16];

	__builtin_memcpy(saved, a, bytes);
	__builtin_memcpy(a, b, bytes);
	__builtin_memcpy(b, saved, bytes);
}

/*
 * Rewrites the packet in ctx, whose headers are known to be there, as r says, and sets its length. l3_len is a
 * constant at every call. Returns 0, or -1 if the packet must be dropped. Packet pointers are void afterwards.
 */
static __always_inline int rewrite(struct xdp_md *ctx, __u32 l3_len, const struct reply *r)
{
	void *data = (void *)(long)ctx->data, *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	void *ip = data + ETH_HLEN;
	struct tcphdr *tcp = ip + l3_len;
	__u32 tcp_len = sizeof(*tcp) + (r->mss ? 4 : 0), tcp_bytes = tcp_len + r->payload;
	__u64 length = data_end - data, sum;

	/* The verifier knows 64-bit arithmetic on packet pointers only, and the compiler would narrow it below. */
	asm volatile("" : "+r"(length));
	if ((void *)(tcp + 1) > data_end)
		return -1;
	if (r->swap) {
		swap_bytes(eth->h_source, eth->h_dest, ETH_ALEN);
		swap_bytes(&tcp->source, &tcp->dest, 2);
	}

	tcp->seq = bpf_htonl(r->seq);
	tcp->ack_seq = bpf_htonl(r->ack);
	((__u8 *)tcp)[12] = tcp_len / 4 << 4;
	((__u8 *)tcp)[13] = r->tcp_flags;
	tcp->window = bpf_htons(r->window);
	tcp->check = 0;
	tcp->urg_ptr = 0;
	sum = sum_words(tcp, sizeof(*tcp)) + r->payload_sum;
	if (r->mss) {
		__u32 *option = (void *)(tcp + 1);

		if ((void *)(option + 1) > data_end)
			return -1;
		*option = bpf_htonl(2 << 24 | 4 << 16 | r->mss);
		sum += *option;
	}

	if (l3_len == sizeof(struct iphdr)) {
		struct iphdr *v4 = ip;

		eth->h_proto = bpf_htons(ETH_P_IP);
		if (r->swap)
			swap_bytes(&v4->saddr, &v4->daddr, 4);
		v4->tos = 0;
		v4->tot_len = bpf_htons(sizeof(*v4) + tcp_bytes);
		v4->id = 0;
		v4->frag_off = bpf_htons(0x4000); /* don't fragment */
		v4->ttl = 64;
		v4->check = 0;
		v4->check = ~fold(sum_words(v4, sizeof(*v4)));
	} else {
		struct ipv6hdr *v6 = ip;

		eth->h_proto = bpf_htons(ETH_P_IPV6);
		if (r->swap)
			swap_bytes(&v6->saddr, &v6->daddr, 16);
		*(__be32 *)v6 = bpf_htonl(6 << 28); /* no traffic class, no flow label */
		v6->payload_len = bpf_htons(tcp_bytes);
		v6->hop_limit = 64;
	}
	tcp->check = ~fold(sum + pseudo_sum(ip, l3_len, tcp_bytes));

	return bpf_xdp_adjust_tail(ctx, (int)(ETH_HLEN + l3_len + tcp_bytes - length)) ? -1 : 0;
}

#endif
