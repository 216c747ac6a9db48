/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/* Excerpt of include/uapi/linux/ipv6.h: only what the BPF programs use. */
#ifndef _IPV6_H
#define _IPV6_H

#include <linux/in6.h>
#include <linux/stddef.h>
#include <linux/types.h>

struct ipv6hdr {
	__u8			priority:4,
				version:4;
	__u8			flow_lbl[3];

	__be16			payload_len;
	__u8			nexthdr;
	__u8			hop_limit;

	__struct_group(/* no tag */, addrs, /* no attrs */,
		struct	in6_addr	saddr;
		struct	in6_addr	daddr;
	);
};

#endif
