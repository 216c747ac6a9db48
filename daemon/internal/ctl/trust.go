//go:build linux

package ctl

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
)

const trustHelp = `When answers through a pod's device do not arrive, because another program or a firewall drops them, probelet stops taking
connections there. "probeletctl status" and "doctor" say so and name the other programs on the device. Once the cause is
removed, this command makes probelet try again, with a single connection at first. It needs root, but not the daemon.`

func trustCommand(env *environment) *cobra.Command {
	var where place
	var pod podArgument
	cmd := &cobra.Command{
		Use:   "trust NAMESPACE/POD",
		Short: "Answer a pod again after answers did not arrive",
		Long:  trustHelp,
		RunE:  func(_ *cobra.Command, args []string) error { return trust(env, where, pod.name(args[0])) },
	}
	pod.flags(cmd, &where)
	where.flags(cmd)
	return cmd
}

func trust(env *environment, where place, name string) error {
	s, err := env.read(where)
	if err != nil {
		return err
	}
	attachments, err := s.OfPod(name)
	if err != nil {
		return err
	}
	k, err := env.open(where.bpfDir)
	if err != nil {
		return err
	}
	if k == nil {
		return errors.New("nothing is attached: the BPF objects are not loaded")
	}
	defer k.Close() //nolint:errcheck // only closes file descriptors
	for _, a := range attachments {
		done, err := trustAgain(k, a)
		if err != nil {
			return fmt.Errorf("pod %s: %w", name, err)
		}
		if _, err := fmt.Fprintf(env.stdout, "%s: %s\n", name, done); err != nil {
			return err
		}
	}
	return nil
}

// trustAgain makes probelet try answers for an attachment again, and says what it did.
func trustAgain(k survey.Kernel, a survey.Attachment) (done string, err error) {
	if a.Trust == "" {
		return "", status.Errorf(status.NotFound, "%s", cmp.Or(a.WhyNotAnswered, "no longer attached"))
	}
	if a.Trust != survey.TrustLost {
		return "nothing to do: " + a.Answers(), nil
	}
	device, err := k.AttachedDevice(attach.ID{ContainerID: a.ContainerID, IfName: a.IfName})
	if err != nil {
		return "", err
	}
	return "answers through " + a.HostIfName + " will be tried again", k.TrustAgain(device.Key)
}
