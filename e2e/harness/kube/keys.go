package kube

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"time"
)

// Files with keys and certificates.
const (
	serviceAccountsKey = "service-accounts.key"
	clientAuthority    = "client-authority.crt" // signs the clients of the kubelet's server
	kubeletClient      = "kubelet-client"       // the API server, as such a client: .crt and .key
)

// writeKeys writes the keys and certificates that the components of a cluster authenticate each other with.
func (c *Cluster) writeKeys() error {
	accounts, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	if err := c.writeKey(serviceAccountsKey, accounts); err != nil {
		return err
	}
	authorityKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "clients"}, NotAfter: time.Now().AddDate(0, 0, 2),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if err := c.writeCertificate(clientAuthority, authority, authority, authorityKey, authorityKey); err != nil {
		return err
	}
	clientKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if err := c.writeKey(kubeletClient+".key", clientKey); err != nil {
		return err
	}
	client := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotAfter: authority.NotAfter,
		Subject:     pkix.Name{CommonName: "kube-apiserver", Organization: []string{"system:masters"}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	return c.writeCertificate(kubeletClient+".crt", client, authority, clientKey, authorityKey)
}

func (c *Cluster) writeKey(name string, key any) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(c.file(name), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

// writeCertificate writes the certificate for key, signed by the authority with authorityKey.
func (c *Cluster) writeCertificate(name string, certificate, authority *x509.Certificate, key, authorityKey *ecdsa.PrivateKey) error {
	der, err := x509.CreateCertificate(rand.Reader, certificate, authority, &key.PublicKey, authorityKey)
	if err != nil {
		return err
	}
	return os.WriteFile(c.file(name), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
}
