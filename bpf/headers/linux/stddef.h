/* SPDX-License-Identifier: GPL-2.0 */
/* Excerpt of include/linux/stddef.h and include/linux/types.h: what stddef.h and stdbool.h have elsewhere. */
#ifndef _LINUX_STDDEF_H
#define _LINUX_STDDEF_H

#undef NULL
#define NULL ((void *)0)

typedef _Bool bool;

enum {
	false	= 0,
	true	= 1
};

#undef offsetof
#define offsetof(TYPE, MEMBER)	__builtin_offsetof(TYPE, MEMBER)

/* From include/uapi/linux/stddef.h. */
#define __struct_group(TAG, NAME, ATTRS, MEMBERS...) \
	union { \
		struct { MEMBERS } ATTRS; \
		struct TAG { MEMBERS } ATTRS NAME; \
	} ATTRS

#endif
