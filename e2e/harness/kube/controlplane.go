package kube

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/e2e/harness/node"
)

// Tokens of the API server's users.
const (
	AdminToken      = "admin"
	NodeToken       = "node"
	controllerToken = "controller-manager"
	SchedulerToken  = "scheduler"
)

// tokens is the API server's file of users: token, name, identity and group.
const tokens = AdminToken + ",admin,admin,system:masters\n" +
	NodeToken + ",system:node:" + ownNode + ",node,system:nodes\n" +
	controllerToken + ",system:kube-controller-manager,controller-manager,\n" +
	SchedulerToken + ",system:kube-scheduler,scheduler,\n"

// file returns the path of a file in the cluster's own directory.
func (c *Cluster) file(name string) string { return filepath.Join(c.dir, name) }

// apiCertificate returns the path of the API server's self-signed certificate.
func (c *Cluster) apiCertificate() string { return c.file("apiserver/apiserver.crt") }

func (c *Cluster) startEtcd() error {
	return c.start("etcd", node.OtherCgroup, "etcd", "--data-dir", c.file("etcd"), "--unsafe-no-fsync", "--log-level", "warn")
}

func (c *Cluster) startAPIServer(ctx context.Context) error {
	if err := c.writeKeys(); err != nil {
		return err
	}
	if err := os.WriteFile(c.file("tokens.csv"), []byte(tokens), 0o600); err != nil {
		return err
	}
	if err := c.StartAPIServer(); err != nil {
		return err
	}
	c.Config = &rest.Config{
		Host: apiAddress, BearerToken: AdminToken, TLSClientConfig: rest.TLSClientConfig{CAFile: c.apiCertificate()}, QPS: 1000, Burst: 1000,
	}
	err := Until(ctx, time.Minute, func(context.Context) (err error) {
		c.Client, err = kubernetes.NewForConfig(c.Config) // succeeds once the server has generated its certificate
		return err
	})
	if err == nil {
		err = c.AwaitAPIServer(ctx)
	}
	if err != nil {
		return errors.Join(err, c.Log("kube-apiserver"))
	}
	return c.writeKubeconfigs()
}

// AdminKubeconfig returns the path of the administrator's kubeconfig.
func (c *Cluster) AdminKubeconfig() string { return c.Kubeconfig(AdminToken) }

// Kubeconfig returns the path of the kubeconfig of the user with this token.
func (c *Cluster) Kubeconfig(token string) string { return c.file(token + ".kubeconfig") }

func (c *Cluster) writeKubeconfigs() error {
	for _, token := range []string{AdminToken, NodeToken, controllerToken, SchedulerToken} {
		text := fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "c",
			"clusters": [{"name": "c", "cluster": {"server": %q, "certificate-authority": %q}}],
			"users": [{"name": "u", "user": {"token": %q}}],
			"contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]}`, apiAddress, c.apiCertificate(), token)
		if err := os.WriteFile(c.Kubeconfig(token), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// StartAPIServer starts the API server, for example after Stop.
func (c *Cluster) StartAPIServer() error {
	if c.Kind {
		return startAPIServerOnKind()
	}
	return c.start("kube-apiserver", node.OtherCgroup, c.Tool("kube-apiserver"),
		"--etcd-servers=http://127.0.0.1:2379",
		"--secure-port=443", "--advertise-address="+NodeIP, "--external-hostname="+NodeIP,
		"--cert-dir="+c.file("apiserver"),
		"--service-cluster-ip-range=10.96.0.0/16",
		"--service-account-issuer="+apiAddress,
		"--service-account-key-file="+c.file(serviceAccountsKey), "--service-account-signing-key-file="+c.file(serviceAccountsKey),
		"--token-auth-file="+c.file("tokens.csv"),
		"--authorization-mode=Node,RBAC",
		"--allow-privileged=true",
		"--feature-gates="+c.gates,
		"--kubelet-client-certificate="+c.file(kubeletClient+".crt"), "--kubelet-client-key="+c.file(kubeletClient+".key"),
		"--kubelet-preferred-address-types=InternalIP",
	)
}

// startControllers starts the controller manager and the scheduler.
func (c *Cluster) startControllers(ctx context.Context) error {
	manager, scheduler := c.Kubeconfig(controllerToken), c.Kubeconfig(SchedulerToken)
	err := c.start("kube-controller-manager", node.OtherCgroup, c.Tool("kube-controller-manager"),
		"--kubeconfig="+manager, "--authentication-kubeconfig="+manager, "--authorization-kubeconfig="+manager,
		"--service-account-private-key-file="+c.file(serviceAccountsKey), "--root-ca-file="+c.apiCertificate(),
		"--use-service-account-credentials", "--leader-elect=false",
		"--cert-dir="+c.file("controller-manager"), "--bind-address=127.0.0.1",
	)
	if err != nil {
		return err
	}
	err = c.start("kube-scheduler", node.OtherCgroup, c.Tool("kube-scheduler"),
		"--kubeconfig="+scheduler, "--authentication-kubeconfig="+scheduler, "--authorization-kubeconfig="+scheduler,
		"--leader-elect=false", "--cert-dir="+c.file("scheduler"), "--bind-address=127.0.0.1",
	)
	if err != nil {
		return err
	}
	// Pods cannot be created until this account exists.
	err = Until(ctx, time.Minute, func(ctx context.Context) error {
		_, err := c.Client.CoreV1().ServiceAccounts(Namespace).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	if err != nil {
		return errors.Join(err, c.Log("kube-controller-manager"))
	}
	return nil
}

// RestartControllers restarts the controller manager and the scheduler. After an outage of the API server they retry with a
// growing backoff of up to a minute, and schedule no pods meanwhile.
func (c *Cluster) RestartControllers(ctx context.Context) error {
	if c.Kind {
		return nil
	}
	for _, name := range []string{"kube-controller-manager", "kube-scheduler"} {
		if err := c.Stop(name, syscall.SIGKILL); err != nil {
			return err
		}
	}
	return c.startControllers(ctx)
}

// AwaitAPIServer waits until the API server answers.
func (c *Cluster) AwaitAPIServer(ctx context.Context) error {
	return Until(ctx, 2*time.Minute, func(ctx context.Context) error {
		_, err := c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	})
}

// kubeletGates converts gates such as "A=true,B=true" to the syntax of the kubelet's configuration.
func kubeletGates(gates string) string {
	return "{" + strings.ReplaceAll(strings.ReplaceAll(gates, "=", ": "), ",", ", ") + "}"
}
