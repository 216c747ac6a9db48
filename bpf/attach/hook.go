package attach

import (
	"fmt"

	"github.com/probelet/probelet/bpf/datapath"
)

// Hook tells where a device's answers are made. The empty value means HookTC.
type Hook string

// Hooks.
const (
	HookTC  Hook = "tc"  // in the tc program steer
	HookXDP Hook = "xdp" // in the XDP program respond, through which every packet of the pod then goes
)

// ParseHook returns the hook with that name. The error lists the names.
func ParseHook(name string) (Hook, error) {
	hook := Hook(name)
	if hook != HookTC && hook != HookXDP {
		return "", fmt.Errorf("must be %q or %q", HookTC, HookXDP)
	}
	return hook, nil
}

func (h Hook) kernel() datapath.Hook {
	if h == HookXDP {
		return datapath.HookXDP
	}
	return datapath.HookTC
}
