package bpftest

import "fmt"

// Reported returns, by plugin, the JSON that CNI plugins report as the "interfaces" of an attachment to this pod. The shapes follow
// the plugins' sources as of 2026.
func (p *Pod) Reported() map[string]string {
	hostEnd := fmt.Sprintf(`{"name": %q, "mac": %q}`, p.HostIfName, p.HostMAC)
	podEnd := fmt.Sprintf(`{"name": "eth0", "mac": %q, "sandbox": %q}`, p.MAC, p.NS.Path())
	return map[string]string{
		"ptp":    "[" + hostEnd + "," + podEnd + "]",
		"Cilium": "[" + hostEnd + "," + podEnd + "]",
		"bridge": `[{"name": "cni0", "mac": "0a:58:0a:f4:00:01"},` + hostEnd + "," + podEnd + "]",
		"Calico": fmt.Sprintf(`[{"name": %q, "mac": "ee:ee:ee:ee:ee:ee", "sandbox": %q}]`, p.HostIfName, p.NS.Path()),
		"AWS": fmt.Sprintf(`[{"name": %q}, {"name": "eth0", "sandbox": %q, "pciID": "254"}, {"name": "dummy1", "mac": "0", "sandbox": "0"}]`,
			p.HostIfName, p.NS.Path()),
		"AWS, trunk interface": fmt.Sprintf(`[{"name": %q}, {"name": "eth0", "sandbox": %q}, {"name": "dummy1", "mac": "7"}]`,
			p.HostIfName, p.NS.Path()),
		"Azure":                fmt.Sprintf(`[{"name": "eth0", "mac": %q}]`, p.MAC),
		"Azure, multi-tenancy": `[{"name": "eth0"}, {"name": "eth1"}]`,
		"kindnet":              `[{"name": "eth0"}]`,
		"host end only":        fmt.Sprintf(`[{"name": %q}]`, p.HostIfName),
		"pod's end only":       "[" + podEnd + "]",
		"none":                 `[]`,
		"no list":              `null`,
		"a null":               `[null]`,
	}
}

// Contradicting returns reports that no plugin would make for this pod, because they name another device.
func (p *Pod) Contradicting(other *Pod) map[string]string {
	return map[string]string{
		"another's host end": fmt.Sprintf(`[{"name": %q}, {"name": "eth0", "sandbox": %q}]`, other.HostIfName, p.NS.Path()),
		"no device's name":   fmt.Sprintf(`[{"name": "vethX"}, {"name": "eth0", "sandbox": %q}]`, p.NS.Path()),
		"another's only":     fmt.Sprintf(`[{"name": %q}]`, other.HostIfName),
		"another's as Calico reports it": fmt.Sprintf(`[{"name": %q, "sandbox": %q}]`,
			other.HostIfName, p.NS.Path()),
		"another interface of the pod": fmt.Sprintf(`[{"name": %q}, {"name": "eth7", "sandbox": %q}]`, p.HostIfName, p.NS.Path()),
	}
}
