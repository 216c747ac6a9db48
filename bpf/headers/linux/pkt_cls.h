/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/* Excerpt of include/uapi/linux/pkt_cls.h: only what the BPF programs use. */
#ifndef __LINUX_PKT_CLS_H
#define __LINUX_PKT_CLS_H

#define TC_ACT_UNSPEC	(-1)
#define TC_ACT_SHOT		2

#endif
